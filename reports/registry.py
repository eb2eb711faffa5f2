"""Every metric by name: what it says, over what, and which direction is good.

`redteam list metrics`, the reports and docs/metrics.md read this table. Notation: c and c_K are
the answers (right or not) without and with compression on the clean image, c' and c'_K on the
attacked one; # counts samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["proportion", "bootstrap", "mean", "maximum"]
"""How the interval is made: Wilson; paired bootstrap by image; normal with variance by image;
none (a largest value)."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the registry.

    Attributes:
        name: key in summary.json and in gates.
        title: for tables and charts.
        definition: one sentence.
        denominator: the samples it is defined on; empty means "not applicable", never 0.
        kind: how the interval is made.
        better: good direction for whoever deploys the model.
        source: where the definition comes from.
    """

    name: str
    title: str
    definition: str
    denominator: str
    kind: Kind
    better: Literal["higher", "lower", "neither"]
    source: str


_ACC = "all measured samples"
_KEPT = "samples whose compressor has a kept set"
_EVIDENCE = "samples with ground-truth evidence tokens and a kept set"
_CSF = "compression-specific failures with a swap test"
_CAA = "after CAA (arXiv 2601.12042); the exact formula is our reconstruction"
_CIRA = 'CIRA ("Still There, No Longer Seen")'
_PLAIN = "plain accuracy"
_DEMANDS = "samples whose answers' demands were recorded"
_AVAILABILITY = "availability"

_ALL = (
    Metric("acc_full_clean", "Accuracy, full, clean",
           "Share answered right with all tokens on the clean image: #c / n.",
           _ACC, "proportion", "higher", _PLAIN),
    Metric("acc_compressed_clean", "Accuracy, compressed, clean",
           "Share answered right with compression on the clean image: #c_K / n.",
           _ACC, "proportion", "higher", _PLAIN),
    Metric("acc_full_attacked", "Accuracy, full, attacked",
           "Share answered right with all tokens on the attacked image: #c' / n.",
           _ACC, "proportion", "higher", _PLAIN),
    Metric("acc_compressed_attacked", "Accuracy, compressed, attacked",
           "Share answered right with compression on the attacked image: #c'_K / n.",
           _ACC, "proportion", "higher", _PLAIN),
    Metric("clean_drop", "Clean drop by compression",
           "Accuracy lost by compression alone, without any attack: (#c − #c_K) / n.",
           _ACC, "bootstrap", "lower", "difference of two accuracies of the same samples"),
    Metric("upr", "UPR",
           "Uncompressed path retained: accuracy with all tokens on attacked images as a share "
           "of that on clean ones, #c' / #c.",
           "samples with c (as a ratio of counts)", "bootstrap", "higher", _CAA),
    Metric("cae", "CAE",
           "Compressed-path effect: relative accuracy lost to the attack with compression on, "
           "1 − #c'_K / #c_K.",
           "samples with c_K (as a ratio of counts)", "bootstrap", "lower", _CAA),
    Metric("csg", "CSG",
           "Compression sensitivity gap: UPR + CAE − 1, the relative drop with compression minus "
           "the relative drop without.",
           "samples with c and samples with c_K (both non-empty)", "bootstrap", "lower",
           "CAA (arXiv 2601.12042)"),
    Metric("amplification", "Amplification",
           "Accuracy points lost to the attack with compression minus those lost without: "
           "((#c_K − #c'_K) − (#c − #c')) / n.",
           _ACC, "bootstrap", "lower", "robustness gap of CAA; the difference is our reading"),
    Metric("csfr", "CSFR",
           "Compression-specific failure rate: of the samples that are right clean, with and "
           "without compression, the share the attack breaks only when compressed, "
           "#(c, c_K, c', not c'_K) / #(c, c_K).",
           "samples with c and c_K", "proportion", "lower", _CIRA),
    Metric("cbr", "CBR",
           "Compression-broken rate: as CSFR, but over the samples whose full path also survived "
           "the attack, #(c, c_K, c', not c'_K) / #(c, c_K, c').",
           "samples with c, c_K and c'", "proportion", "lower", "FATA"),
    Metric("full_asr", "ASR, full",
           "Attack success rate with all tokens: #(c, not c') / #c.",
           "samples with c", "proportion", "lower", _CIRA),
    Metric("compressed_asr", "ASR, compressed",
           "Attack success rate with compression: #(c_K, not c'_K) / #c_K.",
           "samples with c_K", "proportion", "lower", _CIRA),
    Metric("recovered", "Recovered by the clean kept set",
           "Share of compression-specific failures whose attacked image is answered right again "
           "when the tokens kept on the clean image are forced.",
           _CSF, "proportion", "neither", "swap test"),
    Metric("reproduced", "Reproduced by the attacked kept set",
           "Share of compression-specific failures whose clean image fails when the tokens kept "
           "on the attacked image are forced.",
           _CSF, "proportion", "neither", "swap test"),
    Metric("jaccard", "Kept-set Jaccard",
           "Mean overlap of the token sets kept on the clean and on the attacked image, "
           "intersection ÷ union.",
           _KEPT, "mean", "higher", "set overlap"),
    Metric("spearman", "Spearman ρ",
           "Mean rank correlation of the token scores on the clean and on the attacked image.",
           "samples whose compressor scores tokens", "mean", "higher", "CAA, ranking stability"),
    Metric("kendall", "Kendall τ",
           "Mean pair-order correlation of the token scores on the clean and attacked image.",
           "samples whose compressor scores tokens", "mean", "higher", "CAA, ranking stability"),
    Metric("top_preserved", "Top preserved",
           "Mean share of the clean top tokens still in the attacked top (top = 100/576).",
           "samples whose compressor scores tokens", "mean", "higher", "CAA, Top-100 preservation"),
    Metric("bottom_infiltrated", "Bottom infiltrated",
           "Mean share of the clean bottom tokens that entered the attacked top (100/576 each).",
           "samples whose compressor scores tokens", "mean", "lower",
           "CAA, Bottom-100 infiltration"),
    Metric("evidence_kept_clean", "Evidence kept, clean",
           "Mean share of the tokens covering what the question asks about that are kept on the "
           "clean image.",
           _EVIDENCE, "mean", "higher", "ground truth of the data"),
    Metric("evidence_kept_attacked", "Evidence kept, attacked",
           "Mean share of the tokens covering what the question asks about that are kept on the "
           "attacked image.",
           _EVIDENCE, "mean", "higher", "ground truth of the data"),
    Metric("linf", "Largest change",
           "Largest absolute change of any pixel of any sample, in [0, 1], from 8-bit images.",
           "samples with a distance", "maximum", "neither", "distance"),
    Metric("l2", "l2 distance",
           "Mean Euclidean norm of the change, in [0, 1] pixel units, from 8-bit images.",
           "samples with a distance", "mean", "neither", "distance"),
    Metric("psnr", "PSNR",
           "Mean peak signal-to-noise ratio of the attacked image in dB.",
           "samples with a distance whose image changed", "mean", "neither", "distance"),
    Metric("tokens_clean", "Visual tokens, clean",
           "Mean number of visual tokens compression leaves of the clean image.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("tokens_attacked", "Visual tokens, attacked",
           "Mean number of visual tokens compression leaves of the attacked image.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("tokens_growth", "Visual tokens, growth",
           "Mean over samples of the tokens left of the attacked image ÷ those left of the clean "
           "one.",
           "recorded demands with a token on the clean image", "mean", "lower", _AVAILABILITY),
    Metric("length_full_clean", "Answer length, full, clean",
           "Mean tokens of the answer with all tokens on the clean image, end token included.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("length_full_attacked", "Answer length, full, attacked",
           "Mean tokens of the answer with all tokens on the attacked image, end token included.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("length_full_growth", "Answer length, full, growth",
           "Mean over samples of the answer's tokens on the attacked ÷ on the clean image, with "
           "all visual tokens.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("length_compressed_clean", "Answer length, compressed, clean",
           "Mean tokens of the answer with compression on the clean image, end token included.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("length_compressed_attacked", "Answer length, compressed, attacked",
           "Mean tokens of the answer with compression on the attacked image, end token "
           "included.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("length_compressed_growth", "Answer length, compressed, growth",
           "Mean over samples of the answer's tokens on the attacked ÷ on the clean image, with "
           "compression.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("fallback_clean", "Fall-back rate, clean",
           "Share of clean images for which a defence kept more tokens than the compressor would; "
           "0 without such a defence.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
    Metric("fallback_attacked", "Fall-back rate, attacked",
           "Share of attacked images for which a defence kept more tokens than the compressor "
           "would.",
           _DEMANDS, "mean", "lower", _AVAILABILITY),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
"""All metrics by name, in the order in which reports show them."""
