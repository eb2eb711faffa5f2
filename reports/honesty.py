"""The honesty gate: whether a defence's numbers show robustness, rule by rule, from a run alone.

A defence is ADAPTIVE-VERIFIED if every rule that applies and that software can check holds; else
its numbers are an upper bound of what it saves. A rule that cannot be checked from what a run
records is said to be *not checked* and never counts as passed.

Bases: the checklist of Carlini et al. (arXiv 1902.06705), AutoAttack's checks (Croce and Hein,
arXiv 2003.01690), the Indicators of Attack Failure (Pintor et al., arXiv 2106.09947), and what
broke published defences (Tramèr et al., arXiv 2002.08347; Croce et al., arXiv 2202.13711). The
numbers of the rules and their remedies are in docs/defenses.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal

from reports.checks import TOLERANCE, area, broke_compressed, options_of
from reports.draws import drawn_text, over_draws, worst_attack
from reports.evidence import LARGE, Budget, Case, but_steps, is_large
from reports.gate import MAX_ERROR_SHARE
from reports.measure import Row
from reports.records import Cell
from reports.text import count, epsilon_text, plain

DRAWS: Final = 20
"""Least draws of a random defence in each call of its attack. [AutoAttack, "rand"]"""
EVALUATED: Final = 10
"""Least draws under which a random defence is asked."""
QUERIES: Final = 5_000
"""Least questions of the attack without gradients. [AutoAttack's default]"""
ALARM: Final = 0.002
"""Share that such an attack may break beyond all attacks with gradients. [AutoAttack's alpha]"""
UNBOUNDED: Final = 0.99
"""Share that an attack must break within a large budget. [Indicators of Attack Failure, 6]"""
SAMPLES: Final = 300
"""Least samples of a paired comparison. [inferred]"""
BUDGETS: Final = 3
"""Least budgets of a curve. [inferred]"""
UNSTABLE: Final = 0.1
"""Most that a loss may change near a picture, of its size. [Indicators of Attack Failure, 2]"""
MISTAKEN: Final = 0.05
"""Share of the images an attack took for breaks that may break nothing. [inferred: what a gate
tolerates in errors; a margin near zero falls either way with the rounding of another batch]"""
RESTARTS: Final = 5
NOISES: Final = 100
COMMON: Final = 1 - MAX_ERROR_SHARE
"""Least share of the samples that all attacks have in common."""

Level = Literal["MUST", "SHOULD"]


class State(StrEnum):
    """What became of one rule."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"
    NOT_CHECKED = "not checked"
    """It applies, and nothing that a run records decides it."""


Outcome = tuple[State, str]
"""State, and what was seen."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of an honest evaluation.

    Attributes:
        number: in docs/defenses.md; two entries share one where a part of it cannot be checked.
        title: a few words.
        level: a SHOULD that fails is told, and decides nothing.
        remedy: what to do where it fails.
        check: decides it.
    """

    number: int
    title: str
    level: Level
    remedy: str
    check: Callable[[Case], Outcome]


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule on one case."""

    rule: int
    title: str
    level: Level
    state: State
    message: str
    remedy: str
    """"" unless it failed."""

    @property
    def blocks(self) -> bool:
        """Whether it keeps a defence from being verified."""
        return self.level == "MUST" and self.state is State.FAILED

    @property
    def sentence(self) -> str:
        """Number, what was seen, what to do."""
        rest = f"; {self.remedy}" if self.remedy else ""
        return f"rule {self.rule}, {self.title}: {self.message}{rest}"


def audit(case: Case) -> tuple[Finding, ...]:
    """Every rule on one defence at one place, in the order of their numbers."""
    found = []
    for rule in RULES:
        state, message = rule.check(case)
        remedy = rule.remedy if state is State.FAILED else ""
        found.append(Finding(rule.number, rule.title, rule.level, state, message, remedy))
    return tuple(found)


def verified(findings: Sequence[Finding]) -> bool:
    """Whether nothing blocks."""
    return not any(finding.blocks for finding in findings)


def _passed(message: str) -> Outcome:
    return State.PASSED, message


def _failed(message: str) -> Outcome:
    return State.FAILED, message


def _not_applicable(message: str) -> Outcome:
    return State.NOT_APPLICABLE, message


def _needs(rule: int, what: str) -> Outcome:
    """There is nothing to look at, and another rule says so."""
    return State.NOT_CHECKED, f"there is no {what} to look at (rule {rule})"


def _threat_model(case: Case) -> Outcome:
    if not case.adaptive:
        return _needs(3, "adaptive attack")
    random = case.facts is not None and case.facts.stochastic
    for cell in case.adaptive:
        missing = [
            name
            for name, known in (
                ("norm", bool(cell.norm)),
                ("epsilon", cell.epsilon > 0),
                ("access", bool(cell.knowledge)),
                ("knows_defense", cell.knows_defense is not None),
                ("knows_seed", cell.knows_seed is not None or not random),
            )
            if not known
        ]
        if missing:
            return _failed(f"the run does not record {', '.join(missing)} of {_name(cell)}")
    knows = sorted({cell.knowledge for cell in case.adaptive})
    known = "known" if all(c.knows_compression for c in case.adaptive) else "not known to all"
    return _passed(f"access {', '.join(knows)}; defence known, compression {known}")


def _in_the_graph(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    for budget in case.claimed or [_strongest(case)]:
        if case.at(case.sound, budget):
            continue
        cell = case.at(case.white, budget)[0]
        pairs = sorted({row.pipelines for row in case.measured(cell).values()})
        attacked, deployed = next((p for p in pairs if p[0] != p[1] or not p[0]), ("", ""))
        if not deployed:
            why = "the run recorded no hash of what was deployed"
        elif not attacked:
            why = "it ran in a form of its own, not inside the defended target"
        else:
            why = (
                f"it went through pipeline {attacked}, and {deployed} is deployed (another "
                "compressor, none, or another defence)"
            )
        return _failed(f"{_name(cell)}: {why}")
    names = dict.fromkeys(plain(cell.attack) for cell in case.sound)
    return _passed(f"{', '.join(names)} went through the deployed pipeline, by its hash")


def _adaptive_attack(case: Case) -> Outcome:
    facts = case.facts
    if facts is None:
        return _failed("the run does not record what the defence is")
    if facts.route == "none":
        return _failed("the defence names no route by which an attack could go through it")
    if not case.white:
        return _failed("no attack of the run with gradients and several steps adapts to it")
    if not case.claimed:
        return _failed(
            f"adaptive attacks ran only at ε {epsilon_text(LARGE)} or more, where anything breaks"
        )
    for cell in case.white:
        done, asked = len(case.measured(cell)), len(case.manifest.samples)
        if done < COMMON * asked:
            return _failed(f"{_name(cell)} gave {done} of {count(asked, 'image')}")
    names = dict.fromkeys(plain(cell.attack) for cell in case.white)
    return _passed(f"{', '.join(names)}, route {facts.route}")


def _costs(case: Case) -> Outcome:
    if not case.controls:
        return _failed("the run has no cell without the defence to compare with")
    for cells, what in ((case.cells, "with"), (case.controls, "without")):
        if not any(row.seconds for cell in cells for row in case.measured(cell).values()):
            return _failed(f"the seconds of answers {what} the defence are not recorded")
    if not common_clean(case):
        return _failed("no sample was answered both with and without the defence")
    pairs = common_clean(case)
    fell = sum(pair[0].fallbacks[0] for pair in pairs)
    rate = f"; {fell} of {count(len(pairs), 'sample')} fall back" if fell else ""
    return _passed(
        f"clean accuracy and seconds (mean, 95th percentile) of both paths are there{rate}"
    )


def _undefended_control(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    budget = _strongest(case)
    seen = []
    for cell in case.at(case.sound, budget) or case.at(case.white, budget):
        twin, noise = case.twin(cell), _noise_like(case, case.controls, budget)
        if twin is None:
            seen.append(f"{_name(cell)} was not run without the defence")
        elif not noise:
            seen.append(f"no noise was run without the defence at ε {epsilon_text(budget[1])}")
        else:
            found = case.compare([twin], noise)
            shown = f"{found.first} of {count(found.n, 'sample')}, noise {found.second}"
            if found.first_above():
                return _passed(f"without the defence {_name(twin)} broke {shown}")
            seen.append(f"without the defence {_name(twin)} broke {shown}, which chance explains")
    return _failed(seen[0])


def _gradients(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    doubt = case.told(case.white, "zero-gradient", "no-progress")
    if doubt is not None:
        return _failed(f"{_name(doubt.cell)}: {doubt.message}")
    return _passed("no gradient was zero, and the loss went down")


def _stable(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    if case.facts is not None and case.facts.stochastic:
        draws = min(int(options_of(cell).get("draws", 1)) for cell in case.white)
        if draws > 1:
            return _passed(f"each loss of the attack is a mean over {draws} draws")
    worst, where, count_ = -1.0, "", 0
    for cell in case.white:
        rows = case.measured(cell).values()
        seen = [row.unstable for row in rows if row.unstable is not None]
        mean = sum(seen) / len(seen) if seen else -1.0
        if mean > worst:
            worst, where, count_ = mean, _name(cell), len(seen)
    if not count_:
        return _no_stability(case)
    shown = (
        f"at random points within 8/255 the loss of {where} changed by {worst:.1%} of its size on "
        f"average ({count(count_, 'sample')})"
    )
    return _failed(shown) if worst > UNSTABLE else _passed(shown)


def _no_stability(case: Case) -> Outcome:
    if not any(row.judged for cell in case.white for row in case.measured(cell).values()):
        return State.NOT_CHECKED, "the loss at random points around a picture is not recorded"
    checks = case.manifest.scenario.get("checks") or {}
    if checks.get("stability") == 0:
        return _failed("checks.stability is 0, so the loss around a picture was not looked at")
    names = dict.fromkeys(plain(cell.attack) for cell in case.white)
    return (
        State.NOT_CHECKED,
        f"no loss at random points is known of {', '.join(names)}; pgd, apgd, caa, margin_split "
        "and other attacks with the options steps and random_start tell it",
    )


def _best_kept(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    doubt = case.told(case.white, "silent-success")
    if doubt is not None:
        return _failed(f"{_name(doubt.cell)}: {doubt.message}")
    for cell in case.white:
        if not any(row.judged for row in case.measured(cell).values()):
            return (
                State.NOT_CHECKED,
                f"the loss of the image that {_name(cell)} kept is not recorded",
            )
    return _passed("no image was kept, unbroken, with a worse loss than one on the way to it")


def _converged(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    doubt = case.told(case.white, "not-decreasing")
    if doubt is not None:
        return _failed(f"{_name(doubt.cell)}: {doubt.message}")
    budgets = case.claimed or (_strongest(case),)
    told = [_settled(case, budget) for budget in budgets]
    worst = next((one for one in told if one[0] is State.FAILED), None)
    return worst or told[-1]


def _settled(case: Case, budget: Budget) -> Outcome:
    """Twice the steps break no more, of at least one attack that went through the defence."""
    cells = case.at(case.sound, budget) or case.at(case.white, budget)
    if not any(row.traced for cell in cells for row in case.measured(cell).values()):
        return _failed(f"{_name(cells[0])} recorded no loss, so nobody knows where it stood")
    told = f"{_name(cells[0])} was not run with twice the steps beside it"
    for cell in cells:
        steps = options_of(cell).get("steps", 0)
        for more in cells:
            if but_steps(more) != but_steps(cell) or not steps:
                continue
            if options_of(more)["steps"] < 2 * steps:
                continue
            found = case.compare([more], [cell])
            words = (
                f"broke {found.first} of {count(found.n, 'sample')}, {_name(cell)} {found.second}"
            )
            if found.n and found.first - found.second <= TOLERANCE * found.n:
                return _passed(f"with twice the steps {_name(more)} {words}")
            told = f"with twice the steps {_name(more)} still {words}"
    return _failed(told)


def _carries_over(case: Case) -> Outcome:
    """Of images that the attack took for breaks, how many broke nothing of what is deployed."""
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    shown, random = "", case.facts is not None and case.facts.stochastic
    for cell in case.white:
        rows = case.measured(cell).values()
        held = [row for row in rows if row.believed and row.compressed_clean]
        if random and not all(row.draws for row in held):
            return State.NOT_CHECKED, "one draw of a random defence decides nothing (rule 15)"
        lost = sum(not _broke_once(row) for row in held)
        words = f"{lost} of {count(len(held), 'image')} that it took for a break"
        if lost > MISTAKEN * len(held):
            return _failed(f"{_name(cell)}: {words} broke nothing of what is deployed")
        if any(row.believed is not None for row in rows):
            shown = shown or f"{_name(cell)}: {words} did not break the deployed answer"
    if shown:
        return _passed(shown)
    if not any(row.judged for cell in case.white for row in case.measured(cell).values()):
        return State.NOT_CHECKED, "whether an attack took its image for a break is not recorded"
    names = dict.fromkeys(plain(cell.attack) for cell in case.white)
    return _not_applicable(
        f"the loss of {', '.join(names)} has no known zero, so nobody knows whether it took an "
        "image for a break; margin_split, apgd with loss: margin, suite and minimal tell"
    )


def _broke_once(row: Row) -> bool:
    """Whether it broke the deployed answer; under several draws, in one at least.

    An attack on a mean over draws is right about the mean, so one draw may go the other way.
    """
    return broke_compressed(row) or (row.draws is not None and row.draws.broken > 0)


def _unbounded(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    large = [cell for cell in case.white if is_large((cell.norm, cell.epsilon))]
    if not large:
        return _failed("no adaptive attack ran at a budget at which it must break everything")
    top = max(cell.epsilon for cell in large)
    cells = [cell for cell in large if cell.epsilon == top]
    able = {name for cell in cells for name, row in case.measured(cell).items()
            if row.compressed_clean}  # fmt: skip
    hit = sum(broken for name, broken in case.broken(cells).items() if name in able)
    shown = f"at ε {epsilon_text(top)} {hit} of {count(len(able), 'sample')} broke"
    if not able or hit < UNBOUNDED * len(able):
        return _failed(f"{shown}, less than {UNBOUNDED:.0%}")
    return _passed(shown)


def _curve(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    curves: dict[tuple[str, str], set[float]] = {}
    for cell in case.white:
        curves.setdefault((cell.attack, cell.norm), set()).add(round(cell.epsilon, 9))
    (attack, _), budgets = max(curves.items(), key=lambda one: len(one[1]))
    if len(budgets) < BUDGETS:
        return _failed(f"{plain(attack)} ran at {count(len(budgets), 'budget')} only")
    doubt = case.told(case.white, "non-monotone")
    if doubt is not None:
        return _failed(f"{_name(doubt.cell)}: {doubt.message}")
    return _passed(f"{len(budgets)} budgets, and none breaks less than a smaller one")


def _controls(case: Case) -> Outcome:
    if not case.claimed:
        return _needs(3, f"adaptive attack with gradients below ε {epsilon_text(LARGE)}")
    for budget in case.claimed:
        white = case.at(case.white, budget)
        noise, foreign = case.at(case.noise, budget), case.at(case.foreign, budget)
        at = f"at ε {epsilon_text(budget[1])}"
        if not noise:
            return _failed(f"no noise was tried on the defended target {at}")
        if not foreign:
            return _failed(f"no image made without the defence was tried on it {at}")
        for control in (*noise, *foreign, *case.at(case.single, budget)):
            found = case.compare([control], white)
            if found.first - found.second > TOLERANCE * found.n:
                return _failed(
                    f"{_name(control)}, which is weaker, broke {found.first} of "
                    f"{count(found.n, 'sample')}, and all adaptive attacks together {found.second}"
                )
    return _passed("noise, transferred images and single steps break no more")


def _gradient_free(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    budget = _strongest(case)
    asking = case.at(case.asking, budget)
    at = f"at ε {epsilon_text(budget[1])}"
    if not asking:
        return _failed(f"no attack without gradients asked the defended target {at}")
    most = max(cell.declared.get("queries", 0) for cell in asking)
    if most < QUERIES:
        return _failed(f"{_name(asking[0])} asked at most {count(most, 'question')}")
    white = case.broken(case.at(case.white, budget))
    free = case.broken(asking)
    both = [name for name in free if name in white]
    extra = sum(free[name] and not white[name] for name in both)
    shown = f"it broke {extra} of {count(len(both), 'sample')} that no gradient did"
    if not both or extra > ALARM * len(both):
        return _failed(f"{_name(asking[0])}: {shown}")
    return _passed(f"{_name(asking[0])}, {most:,} questions: {shown}")


def _randomness(case: Case) -> Outcome:
    if case.facts is None:
        return _needs(3, "record of what the defence is")
    if not case.facts.stochastic:
        return _not_applicable("it draws nothing")
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    if case.facts.route != "eot":
        return _failed(f"it is random, and its route is {case.facts.route}")
    draws = min(int(options_of(cell).get("draws", 1)) for cell in case.sound or case.white)
    if draws < DRAWS:
        return _failed(f"each call of the attack is the mean over {count(draws, 'draw')}")
    return _passed(f"mean over {draws} draws in each call; evaluated with seed {_seed(case)}")


def _evaluation_draws(case: Case) -> Outcome:
    if case.facts is None:
        return _needs(3, "record of what the defence is")
    if not case.facts.stochastic:
        return _not_applicable("it draws nothing")
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    cells = case.sound or case.white
    rows = [row for cell in cells for row in case.measured(cell).values()]
    least = min((row.draws.count if row.draws else 1 for row in rows), default=1)
    if least == 1 and not any(row.judged for row in rows):
        return State.NOT_CHECKED, "under how many draws answers were asked for is not recorded"
    if least < EVALUATED:
        return _failed(f"the defended target was asked under {count(least, 'draw')} a sample")
    budget = _strongest(case)
    known = case.at(cells, budget) or cells
    found = over_draws(worst_attack(case.measured(cell) for cell in known))
    shown = "" if found is None else f": CSFR {drawn_text(found)}"
    return _passed(f"k = {least} draws a sample at ε {epsilon_text(known[0].epsilon)}{shown}")


def _fixed_draw(case: Case) -> Outcome:
    if case.facts is None:
        return _needs(3, "record of what the defence is")
    if not case.facts.stochastic:
        return _not_applicable("it draws nothing")
    return State.NOT_CHECKED, "no attack here is told the seed that the deployment draws with"


def _optimising(case: Case) -> Outcome:
    if case.facts is None:
        return _needs(3, "record of what the defence is")
    if not case.facts.iterative:
        return _not_applicable("it optimises nothing while it answers")
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    budget = _strongest(case)
    cells, static = case.at(case.white, budget), case.at(case.foreign, budget)
    made = [options_of(cell) for cell in static]
    if not any(_but_adaptive(cell) in made for cell in cells):
        return _failed(f"{_name(cells[0])} was not also made on the static model and transferred")
    return _passed("attacked through it, and with images made on the static model")


def _worst_case(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    asked = len(case.manifest.samples)
    for budget in case.claimed or [_strongest(case)]:
        cells = case.at((*case.adaptive, *case.foreign), budget)
        shared = set.intersection(*(set(case.measured(cell)) for cell in cells))
        if len(shared) < COMMON * asked:
            return _failed(
                f"at ε {epsilon_text(budget[1])} the {count(len(cells), 'attack')} have only "
                f"{len(shared)} of {count(asked, 'sample')} in common"
            )
    return _passed("reported is the worst case over all attacks, sample by sample")


def _restarts(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    most = max(int(options_of(cell).get("restarts", 1)) for cell in case.white)
    if most < RESTARTS:
        return _failed(f"the adaptive attack took {count(most, 'start')}")
    return _passed(f"{most} starts, the best kept")


def _ablation(case: Case) -> Outcome:
    facts = case.facts
    if facts is None:
        return _needs(3, "record of what the defence is")
    listed = {cell.guard.id: cell.guard for cell in case.others if cell.guard is not None}
    if len(facts.parts) > 1:
        for part in facts.parts:
            if part.id not in listed:
                return _failed(f"its part {plain(part.name)} was not tried alone")
    if facts.beams > 1 and not any(
        _type(cell) == "beam" and cell.guard is not None and cell.guard.beams == facts.beams
        for cell in (*case.others, *case.cells)
    ):
        return _failed(f"plain search over {facts.beams} beams was not tried beside it")
    if len(facts.parts) < 2 and facts.beams == 1:
        return _not_applicable("it is one part, at the budget of the compressor")
    return _passed("each part, and the search alone, were tried beside it")


def _paired(case: Case) -> Outcome:
    if not case.white:
        return _needs(3, "adaptive attack with gradients")
    budget = _strongest(case)
    cells = case.at(case.sound, budget) or case.at(case.white, budget)
    best = 0
    for cell in cells:
        twin = case.twin(cell)
        if twin is not None:
            best = max(best, len(case.measured(cell).keys() & case.measured(twin).keys()))
        else:
            best = max(best, len(case.measured(cell)))
    if best < SAMPLES:
        return _failed(f"{count(best, 'sample')} with and without the defence, of {SAMPLES}")
    return _passed(f"{count(best, 'sample')} with and without the defence")


def _many_noises(case: Case) -> Outcome:
    if not case.claimed:
        return _needs(3, "adaptive attack with gradients")
    most = min(len(case.at(case.noise, budget)) for budget in case.claimed)
    if most < NOISES:
        return _failed(f"{count(most, 'draw')} of noise a sample")
    return _passed(f"{most} draws of noise a sample")


def _detector(case: Case) -> Outcome:
    if case.facts is None:
        return _needs(3, "record of what the defence is")
    if "detector" not in case.kinds:
        return _not_applicable("it detects nothing")
    if not case.white:
        return _needs(3, "attack that evades it on purpose")
    for cell in case.white:
        if not all(row.watched for row in case.measured(cell).values()):
            return _failed(
                f"attack success among what it does not flag is missing of {_name(cell)}"
            )
    return _passed("attacks that evade it on purpose; what gets past is in the table of detectors")


def _calibration(case: Case) -> Outcome:
    if case.facts is None:
        return _needs(3, "record of what the defence is")
    if not case.kinds & {"detector", "fallback"}:
        return _not_applicable("it has no threshold")
    fitted = case.facts.calibration
    if fitted is None and "detector" in case.kinds:
        fitted = case.manifest.provenance.get("calibration", {}).get("samples")
    if fitted is None:
        return _failed("it does not tell what its threshold was fitted to")
    shared = set(fitted) & set(case.manifest.samples)
    if shared:
        return _failed(f"its threshold was fitted to {count(len(shared), 'sample')} of this run")
    return _passed(f"fitted to {count(len(fitted), 'other sample')}")


def _oracle(case: Case) -> Outcome:
    if "selection" not in case.kinds:
        return _not_applicable("it does not choose tokens")
    if any(_type(cell) == "oracle" for cell in (*case.others, *case.cells)):
        return _passed("the clean picture's ranking stands beside it")
    return _failed("the clean picture's ranking was not imposed beside it")


def _slow_down(case: Case) -> Outcome:
    if case.facts is None:
        return _needs(3, "record of what the defence is")
    if not case.kinds & {"detector", "fallback"}:
        return _not_applicable("it asks for nothing more than one answer")
    if "detector" in case.kinds:
        return _alarms(case)
    for cell in case.forcing:
        rows = case.measured(cell).values()
        if rows and all(row.seconds for row in rows):
            clean, hit = (sum(row.fallbacks[side] for row in rows) for side in (0, 1))
            took = [sum(row.seconds[index] for row in rows) for index in (1, 3)]
            return _passed(
                f"under {_name(cell)} {hit} of {count(len(rows), 'sample')} fall back (clean "
                f"{clean}), and answers take {took[1] / max(took[0], 1e-9):.2f} times as long"
            )
    return _failed("no attack of the run tries to make it spend more")


def _alarms(case: Case) -> Outcome:
    """Alarms raised on purpose, and what they cost where each is answered with all tokens."""
    told = "no attack of the run raises its alarm on purpose"
    for cell in case.forcing:
        rows = list(case.measured(cell).values())
        if not options_of(cell).get("adaptive") or not rows:
            continue
        if not all(row.seconds for row in rows):
            told = f"the seconds of answers under {_name(cell)} are not recorded"
            continue
        if not all(row.alarms for row in rows):
            return State.NOT_CHECKED, f"which images of {_name(cell)} are flagged is not recorded"
        flagged = [sum(bool(row.alarms and row.alarms[side]) for row in rows) for side in (0, 1)]
        clean, hit = (sum(_with_alarm(row, side) for row in rows) for side in (0, 1))
        return _passed(
            f"under {_name(cell)} {flagged[1]} of {count(len(rows), 'sample')} raise the alarm "
            f"(clean {flagged[0]}); where an alarm is answered again with all tokens, watching and "
            f"answering take {hit / max(clean, 1e-9):.2f} times as long, where it is only "
            "recorded, no longer"
        )
    return _failed(told)


def _with_alarm(row: Row, side: int) -> float:
    """Seconds of an image (0 clean, 1 attacked), watched, and answered again where flagged."""
    full, compressed = row.seconds[2 * side], row.seconds[2 * side + 1]
    return compressed + row.watching + full * bool(row.alarms and row.alarms[side])


def _reproducible(case: Case) -> Outcome:
    cells = case.adaptive or case.cells
    doubt = case.told(cells, "not-repeatable")
    if doubt is not None:
        return _failed(f"{_name(doubt.cell)}: {doubt.message}")
    identity = case.manifest.provenance.get("identity") or {}
    if not (identity.get("targets") or {}).get(case.first.target):
        return _failed("the run holds no hash of the target's weights")
    for cell in cells:
        lost = sum(not row.saved for row in case.measured(cell).values())
        if lost:
            return _failed(f"{count(lost, 'image')} of {_name(cell)} are not in the run folder")
    return _passed("options, seeds, weights by hash and all attacked images are in the run folder")


def _strongest(case: Case) -> Budget:
    """The largest budget at which a claim can be made; a large one where there is no other."""
    if case.claimed:
        return case.claimed[-1]
    return max((cell.norm, round(cell.epsilon, 9)) for cell in case.white)


def _noise_like(case: Case, cells: Sequence[Cell], budget: Budget) -> list[Cell]:
    return [cell for cell in case.at(cells, budget) if cell.knowledge == "none" and not area(cell)]


def _name(cell: Cell) -> str:
    return f"{plain(cell.attack)} at ε {epsilon_text(cell.epsilon)}"


def _but_adaptive(cell: Cell) -> dict[str, Any]:
    """Options of the attack as it is listed without `adaptive`."""
    return {k: v for k, v in options_of(cell).items() if k not in ("adaptive", "draws")}


def _type(cell: Cell) -> str:
    given = cell.spec.get("defense")
    return str(given.get("type", "")) if isinstance(given, dict) else ""


def _seed(case: Case) -> int:
    return case.manifest.seed


def common_clean(case: Case) -> list[tuple[Row, Row]]:
    """Rows of samples answered with and without the defence, one pair for each sample."""
    defended, plain_rows = _fullest(case, case.cells), _fullest(case, case.controls)
    return [(defended[name], plain_rows[name]) for name in defended if name in plain_rows]


def _fullest(case: Case, cells: Sequence[Cell]) -> dict[str, Row]:
    """Rows of the cell with most of them: clean answers are the same in all."""
    return max((dict(case.measured(cell)) for cell in cells), key=len, default={})


RULES: Final[tuple[Rule, ...]] = (
    Rule(1, "threat model", "MUST", "run it again with this version", _threat_model),
    Rule(
        2,
        "defence inside the attack",
        "MUST",
        "add adaptive: true to an attack that knows the compression",
        _in_the_graph,
    ),
    Rule(
        3,
        "an adaptive attack",
        "MUST",
        "add adaptive: true to an attack with gradients that can go through it; without a route "
        "the defence stays unverified",
        _adaptive_attack,
    ),
    Rule(4, "clean accuracy and time", "MUST", "list `none` among the defences", _costs),
    Rule(
        5,
        "undefended control",
        "MUST",
        "list `none` and noise, and raise steps or epsilon until the attack beats noise there",
        _undefended_control,
    ),
    Rule(
        6,
        "available gradients",
        "MUST",
        "declare the route BPDA and write `surrogate`, or attack with another loss",
        _gradients,
    ),
    Rule(
        7,
        "stable loss",
        "MUST",
        "attack a smoothed loss: the mean over several draws or noisy copies, or BPDA through a "
        "smooth `surrogate`; leave checks.stability on",
        _stable,
    ),
    Rule(
        8,
        "best iterate kept",
        "MUST",
        "keep the best iterate of the path, not the last, and say its loss (`Proposal.kept`)",
        _best_kept,
    ),
    Rule(
        9,
        "finished optimisation",
        "MUST",
        "list the same attack with twice the steps, and raise both until it breaks no more",
        _converged,
    ),
    Rule(
        10,
        "success carries over",
        "MUST",
        "what the attack goes through differs from what is deployed: make forward passes equal, "
        "and only the backward pass a surrogate",
        _carries_over,
    ),
    Rule(
        11,
        "unbounded attack",
        "MUST",
        "add a budget of 64/255 or more; what fails there too is weak, or its gradient is masked",
        _unbounded,
    ),
    Rule(12, "curve over budgets", "MUST", "give at least three epsilons", _curve),
    Rule(
        13,
        "weaker attacks break no more",
        "MUST",
        "list noise and the same attack without adaptive; if they win, suspect a masked gradient",
        _controls,
    ),
    Rule(
        14,
        "attack without gradients",
        "MUST",
        "list {type: square, queries: 5000, adaptive: true}; if it wins, suspect a masked gradient",
        _gradient_free,
    ),
    Rule(15, "randomness", "MUST", f"set draws to {DRAWS} or more; the route is EOT", _randomness),
    Rule(
        15,
        "draws of the evaluation",
        "MUST",
        f"set checks.draws to {EVALUATED} or more",
        _evaluation_draws,
    ),
    Rule(15, "attack on a fixed draw", "MUST", "", _fixed_draw),
    Rule(
        16,
        "optimisation in the defence",
        "MUST",
        "list the same attack without adaptive beside it",
        _optimising,
    ),
    Rule(17, "worst case per sample", "MUST", "run it again to fill in what failed", _worst_case),
    Rule(18, "restarts", "SHOULD", f"set restarts to {RESTARTS}", _restarts),
    Rule(
        19,
        "parts on their own",
        "MUST",
        "list each part, and beam with as many beams, as a defence of its own",
        _ablation,
    ),
    Rule(20, "enough samples", "MUST", f"raise dataset.samples to {SAMPLES} or more", _paired),
    Rule(21, "much noise", "SHOULD", "list noise several times", _many_noises),
    Rule(
        22,
        "evade and succeed",
        "MUST",
        "this version cannot show it; read its numbers as an upper bound",
        _detector,
    ),
    Rule(23, "calibration apart", "MUST", "fit it to other samples, and say which", _calibration),
    Rule(24, "oracle beside it", "SHOULD", "list oracle among the defences", _oracle),
    Rule(
        25,
        "slow-down",
        "MUST",
        "list an attack that wants it to spend more, such as force_fallback (with adaptive: true "
        "against a detector) or verbose; until then read its cost as a lower bound",
        _slow_down,
    ),
    Rule(
        26,
        "reproducible",
        "MUST",
        "use deterministic kernels, and run it again with this version",
        _reproducible,
    ),
)
"""All rules, by number."""
