"""What large batches and long training buy, with the rate scaled two ways (SimCLR, Sec. 5.1, Fig. 9 and Table B.1).

As an option, what the temperature and the normalisation of the loss do (Table 5).
"""

from labelwise.config import PretrainSettings, StudySettings
from labelwise.measures.statistics import HELPS, Interval
from labelwise.studies.findings import Comparison, Findings, Paper, Table, compare, points, shown, why_unclear
from labelwise.studies.trials import Material, Name, Outcomes, Trial, accuracy_answers

ANSWERING = 1.0
EPOCH_STEP = 4  # so that a quarter is a whole number
BATCHES = (64, 128, 256, 512)
LENGTHS = {"1/4": 0.25, "1/2": 0.5, "1": 1.0}  # of the study's epochs
RULES = ("linear", "sqrt")
_REFERENCE = 256  # where both rules give the same rate
_PAPER_BATCHES = (256, 512, 1024, 2048, 4096, 8192)
_PAPER_LENGTHS = (100, 200, 400, 800)
_PAPER = {
    "linear": [
        [57.5, 61.9, 64.7, 66.6], [60.7, 64.0, 66.2, 67.8], [62.8, 65.3, 67.2, 68.5],
        [64.0, 66.1, 68.1, 68.9], [64.6, 66.5, 68.2, 68.9], [64.8, 66.6, 67.8, 69.0],
    ],
    "sqrt": [
        [62.8, 64.3, 65.7, 66.5], [63.8, 65.6, 66.7, 67.4], [64.3, 66.1, 67.2, 68.3],
        [64.7, 66.8, 67.9, 68.8], [64.5, 66.8, 68.0, 69.1], [64.8, 67.0, 68.3, 69.1],
    ],
}  # fmt: skip
_PAPER_LOSS = {  # Table 5: similarity and temperature
    "cosine": {"0.05": 59.7, "0.1": 64.4, "0.5": 60.7, "1": 58.0},
    "dot": {"10": 57.2, "100": 57.0},
}


def plan(study: StudySettings, usual: PretrainSettings, width: int) -> list[Trial]:
    """Trials of one seed, the most telling first: the ends of both axes, then what lies between."""
    trials = [
        Trial(_name(batch, length, rule), {"batch_size": batch, "rate_scaling": rule}, length=share)
        for rule in RULES
        for batch in BATCHES
        for length, share in LENGTHS.items()
        if batch != _REFERENCE or rule == RULES[-1]
    ]
    supervised = [
        Trial(("supervised", length), length=share, supervised=True) for length, share in LENGTHS.items()
    ]
    ends = {(batch, length) for batch in (BATCHES[0], BATCHES[-1]) for length in ("1/4", "1")}
    order = sorted(trials, key=lambda trial: (trial.changed["batch_size"], trial.name[1]) not in ends)
    losses = [
        Trial((similarity, value), {"similarity": similarity, "temperature": float(value)})
        for similarity in _PAPER_LOSS
        for value in _temperatures(similarity, usual)
        if study.temperature
    ]
    return [*order[:8], *supervised, *losses, *order[8:]]


def _name(batch: int, length: str, rule: str) -> Name:
    """Of a trial; at the batch that rates are given for, both rules are one."""
    return str(batch), length, "sqrt" if batch == _REFERENCE else rule


def _temperatures(similarity: str, usual: PretrainSettings) -> list[str]:
    """Those of the paper, ascending, and for the similarity that is usual here the usual one."""
    own = {f"{usual.temperature:g}"} if similarity == usual.similarity else set()
    return sorted(_PAPER_LOSS[similarity].keys() | own, key=float)


answer = accuracy_answers


def describe(outcomes: Outcomes, material: Material, study: StudySettings) -> Findings:
    """Accuracy by batch, length and rule, what of the batch is the rate, and advice."""
    batches = [batch for batch in BATCHES if batch <= len(material.pool.rows) / 2]
    lengths = [max(1, round(share * material.epochs)) for share in LENGTHS.values()]
    epochs = [f"{length} epoch{'s' if length > 1 else ''}" for length in lengths]

    def level(batch: int, length: str, rule: str) -> Interval | None:
        return outcomes.level(_name(batch, length, rule), "h")

    left_out = "" if batches == list(BATCHES) else " Batches above half of the images were left out."
    tables = [
        Table(
            f"Linear accuracy by batch and length, {words}",
            [f"batch {batch}" for batch in batches],
            epochs,
            [[level(batch, length, rule) for length in LENGTHS] for batch in batches],
            "lines",
            paper=Paper(
                f"Table B.1, {words}",
                [f"batch {batch:,}" for batch in _PAPER_BATCHES],
                [f"{length} epochs" for length in _PAPER_LENGTHS],
                _PAPER[rule],
            ),
            note=f"At batch {_REFERENCE} both rules give the same rate.{left_out}",
        )
        for rule, words in (("linear", "rate proportional to the batch"), ("sqrt", "rate proportional to its square root"))
    ]  # fmt: skip
    tables.append(
        Table(
            "Accuracy of supervised training from scratch, by length",
            ["supervised"],
            epochs,
            [[outcomes.level(("supervised", length), "h") for length in LENGTHS]],
            "lines",
        )
    )
    if study.temperature:
        tables += [_by_temperature(outcomes, similarity, material.settings) for similarity in _PAPER_LOSS]
    small, large = min(batches, default=BATCHES[0]), max(batches, default=BATCHES[-1])

    def ends(length: str, rule: str, paper: str) -> Comparison:
        first, second = (_name(batch, length, rule) for batch in (large, small))
        how_long = "shortest" if length == "1/4" else "longest"
        words = f"batch {large} against {small}, {how_long} training, {rule} rate"
        return compare(outcomes, words, (first, "h"), (second, "h"), paper)

    longer = compare(
        outcomes,
        f"batch {small}, sqrt rate: longest training against shortest",
        (_name(small, "1", "sqrt"), "h"),
        (_name(small, "1/4", "sqrt"), "h"),
        "+3.7 points, batch 256, 800 against 100 epochs (Table B.1)",
    )
    short_linear = ends("1/4", "linear", "+7.3 points, 8,192 against 256, 100 epochs (Table B.1)")
    short_sqrt = ends("1/4", "sqrt", "+2.0 points, the same (Table B.1)")
    long_sqrt = ends("1", "sqrt", "+2.6 points, 800 epochs (Table B.1)")
    comparisons = [longer, short_linear, short_sqrt, long_sqrt]
    losses = _compare_losses(outcomes, material.settings) if study.temperature else {}
    advice, recipe = _advise(longer, long_sqrt, large, small, *_better_loss(losses))
    return Findings(tables, [*comparisons, *losses.values()], advice, recipe)


def _by_temperature(outcomes: Outcomes, similarity: str, usual: PretrainSettings) -> Table:
    values, paper = _temperatures(similarity, usual), _PAPER_LOSS[similarity]
    words = {"cosine": "cosine similarity", "dot": "inner product"}[similarity]
    return Table(
        f"Linear accuracy by temperature of the loss, {words}",
        [similarity],
        values,
        [[outcomes.level((similarity, value), "h") for value in values]],
        "lines",
        paper=Paper(f"Table 5, {words}", [similarity], list(paper), [list(paper.values())]),
    )


def _compare_losses(outcomes: Outcomes, usual: PretrainSettings) -> dict[Name, Comparison]:
    """Every other loss against the usual one, and cosines against inner products at the paper's best temperatures."""
    paper: dict[Name, float] = {(similarity, value): level for similarity, found in _PAPER_LOSS.items() for value, level in found.items()}  # fmt: skip
    own: Name = (usual.similarity, f"{usual.temperature:g}")

    def against(first: Name, second: Name) -> Comparison:
        known = f"{paper[first] - paper[second]:+.1f} points (Table 5)" if {first, second} <= paper.keys() else ""  # fmt: skip
        words = f"{first[0]} at temperature {first[1]} against {second[0]} at {second[1]}"
        return compare(outcomes, words, (first, "h"), (second, "h"), known)

    rivals: list[Name] = [
        (similarity, value) for similarity in _PAPER_LOSS for value in _temperatures(similarity, usual)
    ]
    found = {rival: against(rival, own) for rival in rivals if rival != own}
    return {**found, ("paper",): against(("cosine", "0.1"), ("dot", "10"))}


def _better_loss(compared: dict[Name, Comparison]) -> tuple[str, dict[str, object]]:
    """The loss that is shown to be better than the usual one by most, if one is."""
    better = {rival: each.difference for rival, each in compared.items() if len(rival) == 2 and each.verdict == HELPS and each.difference}  # fmt: skip
    if not better:
        return "", {}
    similarity, value = best = max(better, key=lambda rival: better[rival].mean)
    words = f"{similarity} similarity at temperature {value} is better than the usual loss: {points(better[best])}"
    return words, {"similarity": similarity, "temperature": float(value)}


def _advise(
    longer: Comparison, larger: Comparison, large: int, small: int, loss: str, recipe: dict[str, object]
) -> tuple[str, dict[str, object]]:
    """Whether to train longer, with which batch, and with which loss."""
    parts: list[str] = []
    if longer.verdict == HELPS and longer.difference is not None:
        parts.append(f"longer training pays: {points(longer.difference)} from four times the epochs")
    if (difference := shown(larger)) is not None:
        parts.append(f"batch {large} against {small}: {points(difference)} in the longest training")
        recipe = {"batch_size": large if difference.mean > 0 else small, "rate_scaling": "sqrt", **recipe}
    if loss:
        parts.append(loss)
    if not parts:
        return f"On your images: {why_unclear([longer, larger])}.", {}
    return f"On your images {'; '.join(parts)}.", recipe
