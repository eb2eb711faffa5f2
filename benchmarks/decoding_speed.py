"""Tokens per second of every decoding defence, against greedy decoding and beam search.

``python benchmarks/decoding_speed.py`` times whole answers (vision tower, prefill, 64 new tokens)
of one model in one run, all methods in turn, round after round, so that a machine that slows down
slows all of them. No token ends an answer, so that all decode equally many. Ratios are taken within
a round; what is read is their median. ``decode`` leaves out all up to the first token.

Models: ``wide`` is a LLaVA of random weights with LLaVA-1.5's prompt length (576 visual tokens),
wide enough for arithmetic to outweigh Python; ``scenes`` the trained scenes LVLM, where it is the
other way round. The vocabulary of 4096 keeps the head's share of the weights of ``wide`` near what
it is in a model of 7B parameters (2 %); LLaVA-1.5's, ``--vocabulary 32064``, is a sixth of them at
this width.

With one thread, seconds are the processor's, which other jobs on the machine disturb little.
``--update`` replaces the run of the same model and batch in the results and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compression import SHAPES, random_llava
from torch import Tensor

from defenses.beam import BeamSearch
from defenses.dola import DoLa
from defenses.icd import ICD
from defenses.m3id import M3ID
from defenses.pai import PAI
from defenses.sid import SID
from defenses.vasparse import VASparse
from defenses.vcd import VCD
from targets.decoding import Decoding
from targets.decoding.assembly import Asked
from targets.decoding.search import Ends
from targets.lvlm import LVLM
from targets.scenes import load_scenes

OUT = Path(__file__).resolve().parent / "results" / "decoding_speed.json"
METHODS: dict[str, Decoding | None] = {
    "greedy": BeamSearch(beams=1),
    "transformers greedy": None,
    "vasparse": VASparse(beams=1),
    "vcd": VCD(),
    "icd": ICD(),
    "sid": SID(),
    "dola": DoLa(),
    "pai": PAI(),
    "m3id": M3ID(),
    "vasparse, selection only": VASparse(beams=1, svcd=False, sink=False),
    "vasparse, contrast only": VASparse(beams=1, select=False, sink=False),
    "vasparse, sink penalty only": VASparse(beams=1, select=False, svcd=False),
    "beam 3": BeamSearch(beams=3),
    "transformers beam 3": None,
    "vasparse 3": VASparse(beams=3),
}
AGAINST = {"beam 3": "greedy", "transformers beam 3": "beam 3", "vasparse 3": "beam 3"}
"""What a method is compared with, where it is not greedy decoding."""
PUBLISHED = {"vasparse": 0.89, "vcd": 0.56, "beam 3": 0.957, "vasparse 3": 0.927, "sid": 0.668,
             "dola": 0.756}  # fmt: skip
"""Ratios of LLaVA-1.5-7B on A100 (arXiv 2501.06553, Table 1), where VASparse always had beams."""
WORDS = 64
"""Text tokens of the wide model's prompt."""
NOBODY = -1
"""An end token that no model says."""


@dataclass
class Times:
    """Seconds of one method's answers, round by round, and bytes of its cache."""

    whole: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    cache: int | None = None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["wide", "scenes"], default="wide")
    parser.add_argument("--layers", type=int, default=SHAPES["wide"]["layers"], help="of wide")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of wide")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="methods, separated by semicolons; default: all")
    parser.add_argument("--update", action="store_true", help="keep other rows of the results")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.model == "wide":
        lvlm = wide(arguments.layers, arguments.vocabulary)
    else:
        lvlm = load_scenes("scenes-a")
    asked = questions(lvlm, arguments.batch, arguments.model)
    names = [name for name in arguments.only.split(";") if name] or list(METHODS)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    times = measured(lvlm, asked, names, arguments.tokens, arguments.repeats, clock)
    words = ["benchmarks/decoding_speed.py", *sys.argv[1:]]
    run = {
        "model": arguments.model,
        "batch": arguments.batch,
        "command": shlex.join(["python", *words]),
        "layers": len(lvlm.family.layers),
        "vocabulary": int(lvlm.family.model.config.text_config.vocab_size),
        "prompt_tokens": prompt_of(lvlm, asked)["input_ids"].shape[1],
        "new_tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "clock": clock.__name__,
        "device": "cpu",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rows": rows(times, arguments.batch, arguments.tokens),
    }
    keep(arguments.out, run, update=arguments.update)
    show(run)


def measured(
    lvlm: LVLM,
    asked: Asked,
    names: list[str],
    tokens: int,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, Times]:
    """Times of all methods, interleaved; the first round warms up."""
    times = {name: Times() for name in names}
    noted = FirstToken(lvlm, clock)
    for turn in range(repeats + 1):
        for name in names:
            method = METHODS[name]
            noted.first = None
            begin, cache = clock(), None
            if method is None:
                ids = of_transformers(lvlm, asked, tokens, 3 if "beam" in name else 1)
            else:
                ids, cache = decoded(lvlm, asked, method, tokens)
            end = clock()
            if tuple(ids.shape) != (len(asked.images), tokens) or noted.first is None:
                raise SystemExit(f"{name} said {list(ids.shape)} tokens, not {tokens} a row")
            if turn:
                times[name].whole.append(end - begin)
                times[name].decode.append(end - noted.first)
                times[name].cache = cache
        print(f"round {turn} of {repeats}", flush=True)
    return times


class FirstToken:
    """Notes when the first forward of a single token begins: all before made the first token."""

    def __init__(self, lvlm: LVLM, clock: Callable[[], float]) -> None:
        self.first: float | None = None
        self._clock = clock
        lvlm.family.core.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: object, args: object, kwargs: dict[str, Any]) -> None:
        del module, args
        if self.first is None and kwargs["input_ids"].shape[1] == 1:
            self.first = self._clock()


def decoded(lvlm: LVLM, asked: Asked, method: Decoding, tokens: int) -> tuple[Tensor, int]:
    """Ids ``[B, tokens]``, and bytes of keys and values in the end."""
    run = lvlm._passes.decoder(method, asked)
    ids = run.generate(Ends((NOBODY,), lvlm._passes.prompts.pad, tokens))
    held = [layer for branch in run.branches for layer in branch._cache.layers]
    return ids, sum(one.keys.nbytes + one.values.nbytes for one in held)


def of_transformers(lvlm: LVLM, asked: Asked, tokens: int, beams: int) -> Tensor:
    """``generate`` of transformers on the same prompt."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=beams,
        eos_token_id=NOBODY,
        pad_token_id=lvlm._passes.prompts.pad,
    )
    arguments = prompt_of(lvlm, asked)
    with torch.no_grad():
        ids: Tensor = lvlm.family.model.generate(generation_config=config, **arguments)
    return ids[:, arguments["input_ids"].shape[1] :]


def prompt_of(lvlm: LVLM, asked: Asked) -> dict[str, Tensor]:
    """Arguments of the model's ``forward``."""
    inputs, layout, size = lvlm._passes.inputs(asked.images)
    prompt = lvlm._passes.prompts.prompt(asked.questions, layout, size)
    return {"input_ids": prompt.ids, "attention_mask": prompt.mask, **inputs}


def questions(lvlm: LVLM, batch: int, model: str) -> Asked:
    """A batch of noise pictures with one question."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(batch, 3, *lvlm.family.image_size, generator=generator)
    text = " ".join(["what"] * (WORDS - 2)) if model == "wide" else "is there a red circle?"
    return Asked(pictures, (text,) * batch, draws=tuple(range(batch)))


def wide(layers: int, vocabulary: int) -> LVLM:
    """A LLaVA of random weights with a processor of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    model = random_llava({**SHAPES["wide"], "layers": layers, "vocabulary": vocabulary})
    side = SHAPES["wide"]["side"]
    words = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "You", "are", "a", "confused", "object"]
    table = {word: place for place, word in enumerate(words)}
    table["<image>"] = model.config.image_token_id
    core = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    template = (
        "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=template,
    )  # fmt: skip
    return LVLM(model, processor)


def rows(times: dict[str, Times], batch: int, tokens: int) -> list[dict[str, Any]]:
    """A row of results a method."""
    found = []
    for name, one in times.items():
        row: dict[str, Any] = {
            "method": name,
            "tokens_per_second": round(batch * tokens / statistics.median(one.whole), 3),
            "decode_tokens_per_second": round(
                batch * (tokens - 1) / statistics.median(one.decode), 3
            ),
            "cache_mib": None if one.cache is None else round(one.cache / 2**20, 1),
        }
        against = AGAINST.get(name, "greedy")
        if against in times and against != name:
            other = times[against]
            row |= {"against": against, "published": PUBLISHED.get(name)}
            for kind in ("whole", "decode"):
                pairs = zip(getattr(other, kind), getattr(one, kind), strict=True)
                ratios = sorted(theirs / ours for theirs, ours in pairs)
                row[kind] = round(statistics.median(ratios), 4)
                row[f"{kind}_range"] = [round(ratios[0], 4), round(ratios[-1], 4)]
        found.append(row)
    return found


def keep(out: Path, run: dict[str, Any], *, update: bool) -> None:
    """Write the results, with those of other models and batches if they are to be kept."""
    runs = []
    if update and out.is_file():
        runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
        parts = ("model", "layers", "batch", "vocabulary")
        runs = [one for one in runs if any(one[part] != run[part] for part in parts)]
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = sorted(
        [*runs, run], key=lambda one: (one["model"] != "wide", -one["layers"], one["batch"])
    )
    out.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def show(run: dict[str, Any]) -> None:
    """The table."""
    print(f"{'method':28} {'tokens/s':>9} {'decode':>9}  {'against':8} {'whole':>6} {'decode':>6}")
    for row in run["rows"]:
        ratios = [f"{row[kind]:6.3f}" if kind in row else " " * 6 for kind in ("whole", "decode")]
        print(
            f"{row['method']:28} {row['tokens_per_second']:9.2f} "
            f"{row['decode_tokens_per_second']:9.2f}  {row.get('against', ''):8} {' '.join(ratios)}"
        )


if __name__ == "__main__":
    main()
