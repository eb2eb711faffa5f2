import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_data import manifest

from reports.html.images import EXACT, REDUCED, Pair, load_pair
from reports.html.svg import UNIT, overlay, scale_for, tag
from reports.store import RunStore


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def decoded(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)


def pair(folder: Path, clean: np.ndarray, attacked: np.ndarray) -> Pair:
    with RunStore.create(folder, manifest()) as store:
        names = [store.save_png(png(pixels)) for pixels in (clean, attacked)]
        found = load_pair(store, *names)
    assert isinstance(found, Pair)
    return found


def test_small_images_are_shown_exactly_and_their_change_amplified(tmp_path: Path) -> None:
    clean = np.full((4, 6, 3), 100)
    attacked = clean.copy()
    attacked[0, 0], attacked[1, 1] = 108, 96
    found = pair(tmp_path / "run", clean, attacked)
    assert (decoded(found.clean.uri) == clean).all()
    assert (decoded(found.attacked.uri) == attacked).all()
    assert not found.clean.reduced
    assert (found.clean.width, found.clean.height) == (6, 4)
    assert found.gain == 127 // 8
    assert found.difference is not None
    change = decoded(found.difference.uri)
    assert change[0, 0, 0] == 128 + 8 * 15
    assert change[1, 1, 0] == 128 - 4 * 15
    assert change[2, 2, 0] == 128


def test_equal_images_have_a_flat_difference(tmp_path: Path) -> None:
    clean = np.full((4, 4, 3), 7)
    found = pair(tmp_path / "run", clean, clean)
    assert found.gain == 0
    assert found.difference is not None
    assert (decoded(found.difference.uri) == 128).all()


def test_large_images_are_reduced_and_say_so(tmp_path: Path) -> None:
    clean = np.random.default_rng(0).integers(0, 255, (2 * REDUCED, REDUCED, 3))
    found = pair(tmp_path / "run", clean, clean)
    assert found.clean.reduced
    assert (found.clean.width, found.clean.height) == (REDUCED // 2, REDUCED)
    assert REDUCED > EXACT


def test_images_of_different_sizes_have_no_difference(tmp_path: Path) -> None:
    found = pair(tmp_path / "run", np.zeros((4, 4, 3)), np.zeros((4, 5, 3)))
    assert found.difference is None


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", manifest()) as store:
        name = store.save_png(b"no image")
        assert "cannot be shown" in str(load_pair(store, name, name))
        assert "cannot be shown" in str(load_pair(store, "0" * 64, name))
        assert "No image was stored" in str(load_pair(store, None, name))


def test_an_overlay_darkens_what_was_dropped_and_outlines_the_evidence() -> None:
    drawn = str(overlay((2, 3), kept=[0, 4], evidence=[4, 5]))
    assert 'class="dropped" d="M1 0h2v1h-2zM0 1h1v1h-1zM2 1h1v1h-1z"' in drawn
    # Tokens 4 and 5 touch: the line between them is not drawn.
    assert 'class="evidence" d="M1 1h1M1 2h1M1 1v1M2 1h1M2 2h1M3 1v1"' in drawn
    assert "evidence" not in str(overlay((2, 3), kept=[0], evidence=None))


@pytest.mark.parametrize("values", [[], [0.0, 0.01], [-0.2, 0.9], [0.5, 0.7], [-9.0, 9.0]])
def test_a_scale_holds_zero_and_has_few_ticks(values: list[float]) -> None:
    scale = scale_for(values)
    assert scale.low <= 0 <= scale.high
    assert scale.high > scale.low
    assert 2 <= len(scale.ticks) <= 8
    assert 0 in scale.ticks


def test_svg_is_escaped_and_positions_stay_inside() -> None:
    assert str(tag("text", "<b>&\u202e", x='"1')) == (
        '<text x="&#34;1">&lt;b&gt;&amp;⟨U+202E⟩</text>'
    )
    assert (UNIT.at(-3), UNIT.at(0.25), UNIT.at(7)) == (0, 25, 100)
