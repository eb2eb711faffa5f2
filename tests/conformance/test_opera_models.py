"""OPERA inside real models: plain beam search at nothing, and steps back that are right."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from decoded import (
    COMPRESSORS,
    FAMILIES,
    STEPS,
    Plain,
    asked,
    check_rows,
    generated_logprobs,
    spoken,
    target,
)
from torch import Tensor

from defenses.beam import BeamSearch
from defenses.opera import OPERA, Retrospection
from targets.lvlm import LVLM


@dataclass(frozen=True, kw_only=True)
class Searching(OPERA):
    """Its own search also where plain beam search would do."""

    @property
    def acts(self) -> bool:
        return True


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest) -> LVLM:
    return target(request.param)


@pytest.mark.parametrize("compression", ["none", "fastv"])
@pytest.mark.parametrize(("width", "length_penalty"), [(1, 1.0), (3, 0.0)])
def test_without_penalty_and_steps_back_it_is_beam_search(
    lvlm: LVLM, compression: str, width: int, length_penalty: float
) -> None:
    how = {"beams": width, "length_penalty": length_penalty}
    nothing = {"penalty_weights": 0.0, "rollbacks": 0, "num_attn_candidates": 10_000}
    one = asked(lvlm, COMPRESSORS[compression])
    wanted = spoken(lvlm, BeamSearch(**how), one)  # type: ignore[arg-type]
    assert torch.equal(spoken(lvlm, OPERA(**how, **nothing), one), wanted)  # type: ignore[arg-type]
    assert torch.equal(spoken(lvlm, Searching(**how, **nothing), one), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("compression", ["none", "fastv reindexed", "pyramiddrop"])
def test_a_step_back_is_an_answer_begun_anew(
    lvlm: LVLM, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and notes behind a step back, against the same tokens run from the prompt on."""
    method = OPERA(beams=2, num_attn_candidates=3, first_tokens=1, threshold=1, damping=1.0)
    seen: list[tuple[list[list[int]], Tensor, Tensor]] = []
    real = Retrospection._return

    def spy(search: Retrospection, place: int, first: Tensor) -> Tensor:
        logits = real(search, place, first)
        seen.append((search._stands[place].said, logits, search.trail.products))
        return logits

    monkeypatch.setattr(Retrospection, "_return", spy)
    rows = [slice(row, row + 1) for row in range(3)]
    found = 0
    for row in rows:
        one = asked(lvlm, COMPRESSORS[compression], row)
        seen.clear()
        spoken(lvlm, method, one, STEPS + 5)
        found += len(seen)
        for said, logits, products in seen[:3]:
            for place, tokens in enumerate(said):
                forced = torch.tensor([[*tokens, 0]])
                wanted = generated_logprobs(lvlm, Plain(), one, forced)[0, -1]
                assert torch.allclose(logits[place].log_softmax(-1), wanted, atol=1e-4)
                run = lvlm._passes.decoder(method, one)
                with torch.no_grad():
                    run._start()
                    for token in tokens:
                        run._advance(torch.tensor([token]))
                notes = run.branches[0].rule.products  # type: ignore[union-attr]
                assert torch.allclose(products[place], notes[0], atol=1e-3)
    assert found, "no hypothesis was taken back"


@pytest.mark.parametrize("compression", ["none", "pyramiddrop"])
def test_samples_of_a_batch_go_back_by_themselves(lvlm: LVLM, compression: str) -> None:
    method = OPERA(beams=2, num_attn_candidates=3, first_tokens=1, threshold=1, damping=1.0)
    check_rows(lvlm, method, COMPRESSORS[compression])


def test_the_attention_noted_is_that_of_the_model() -> None:
    """Against the attention that transformers give out for the whole sequence."""
    lvlm = target("llava")
    one = asked(lvlm, None, slice(0, 1))
    method = OPERA(first_tokens=0, damping=1.0)
    run, tokens = lvlm._passes.decoder(method, one), [14, 19, 17, 13]
    with torch.no_grad():
        run._start()
        for token in tokens:
            run._advance(torch.tensor([token]))
        prompt = run.branches[0].prompt
        model = lvlm.family.model
        model.set_attn_implementation("eager")
        inputs, _, _ = lvlm._passes.inputs(one.images)
        whole = model(
            input_ids=torch.cat([prompt.ids, torch.tensor([tokens])], 1),
            output_attentions=True,
            **inputs,
        ).attentions[-1][0]
    most = whole.amax(0)
    most = most / most.sum(1, keepdim=True)
    local = (50 * most[-4:, -4:]).double().log()
    wanted = [sum(float(local[i, j]) for i in range(j, 4)) for j in range(4)]
    trail = run.branches[0].rule
    assert trail.products[0].tolist() == pytest.approx(wanted, abs=1e-3)  # type: ignore[union-attr]
    visual = prompt.ids[0] == lvlm.family.image_token_id
    paid = float(most[-1, : len(visual)][visual].sum())
    assert float(trail.seen[0]) == pytest.approx(paid, abs=1e-5)  # type: ignore[union-attr]


def test_the_first_tokens_are_led_to_the_picture() -> None:
    """A large weight makes the candidate win that attends to visual tokens most."""
    lvlm = target("llava")
    one = asked(lvlm, None, slice(0, 1))
    method = OPERA(beams=1, num_attn_candidates=6, penalty_weights=1e5, rollbacks=0)
    said = int(spoken(lvlm, method, one, 1)[0, 0])
    run = lvlm._passes.decoder(method, one)
    with torch.no_grad():
        best = run._start().topk(6).indices[0]
        run._select(torch.zeros(6, dtype=torch.long))
        run._advance(best)
    paid = run.branches[0].rule.seen  # type: ignore[union-attr]
    assert said == int(best[paid.argmax()])
