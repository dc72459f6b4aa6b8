"""How far two models' next-token distributions lie from each other on given texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Positions read together, unless one text has more, and positions compared at a time in float32. With a vocabulary of
# 150,000 each of two models' logits are 77 MB in bfloat16, and four float32 temporaries 150 MB each.
_POSITIONS = 256


@dataclass(frozen=True)
class Text:
    """A text as tokens, and from where on it is looked at.

    Args:
        tokens: Its tokens, at least one.
        start: Position of the first prediction that is compared, in [0, len(tokens)): 0 is what follows the first
            token.
    """

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class TextDistance:
    """Sums over the compared positions of one text."""

    kl: float
    """Sum of KL(reference || model) in nats."""
    same: int
    """Positions at which both have the same likeliest token."""
    num_tokens: int
    """Positions compared."""


@dataclass(frozen=True)
class KlDifference:
    """Mean KL of `first` minus that of `second`, of one reference on the same texts: negative if `first` is nearer."""

    first: str
    """Name of a model."""
    second: str
    """Name of another."""
    difference: float
    """In nats per token."""
    low: float | None
    """Lower end of its bootstrap interval over texts, drawn for both models together; `None` with fewer than two."""
    high: float | None
    """Upper end, likewise."""
    confidence: float
    """Two-sided confidence of the interval."""


def kl_difference(
    first: tuple[str, Sequence[float]],
    second: tuple[str, Sequence[float]],
    num_tokens: Sequence[int],
    *,
    confidence: float,
    seed: int = 0,
) -> KlDifference:
    """Compare how far two models lie from one reference, text by text.

    Texts differ in how far models go from each other, and that is common to both: the interval of the difference is
    narrower than the two intervals suggest.

    Args:
        first: Name of a model, and the sums of its KL, one per text.
        second: The same of the other.
        num_tokens: Positions of each text.
        confidence: Two-sided confidence, in (0, 1).
        seed: Of the bootstrap.
    """
    sums = np.asarray(first[1], dtype=np.float64) - np.asarray(second[1], dtype=np.float64)
    interval = mean_with_interval(sums, np.asarray(num_tokens, dtype=np.float64), confidence=confidence, seed=seed)
    return KlDifference(first[0], second[0], *interval, confidence)


def output_distances(
    reference: Any, model: Any, texts: Sequence[Text], *, progress: bool = False
) -> list[TextDistance]:
    """Compare two models' distributions over the vocabulary at every position of texts, teacher-forced.

    Both compute in their own dtype; log-softmax and sums are in float32 and float64. A model against itself gives 0.
    Beside the two models, memory holds the logits of a few texts from the first position compared on, of a long text
    alone, and float32 copies of 256 positions. So two 7B models in bfloat16 fit where 30 GB are free.

    Args:
        reference: The first argument of the divergence; its mode is left as it was.
        model: The second one.
        texts: In any order; those of like length are read together, padded on the right.
        progress: Show a bar on stderr.

    Returns:
        One entry per text, in their order.
    """
    from tqdm import tqdm

    order = sorted(range(len(texts)), key=lambda index: len(texts[index].tokens))
    found: dict[int, TextDistance] = {}
    with (
        _judging(reference),
        _judging(model),
        torch.no_grad(),
        tqdm(total=len(order), desc="compare", unit="text", disable=not progress) as bar,
    ):
        while order:
            longest = len(texts[order[-1]].tokens)
            count = max(1, _POSITIONS // longest)
            batch, order = order[-count:], order[:-count]
            rows, before = [texts[index].tokens for index in batch], min(texts[index].start for index in batch)
            ours, theirs = _logits(reference, rows, before), _logits(model, rows, before)
            for index, first, second in zip(batch, ours, theirs, strict=True):
                text = texts[index]
                part = slice(text.start - before, len(text.tokens) - before)
                found[index] = _distance(first[part], second[part])
            bar.update(len(batch))
    return [found[index] for index in range(len(texts))]


def mean_with_interval(
    sums: NDArray[np.float64], counts: NDArray[np.float64], *, confidence: float, seed: int, resamples: int = 2000
) -> tuple[float, float | None, float | None]:
    """Return sum over count with the percentile interval of a bootstrap over texts, `None` with fewer than two texts.

    Of one text every resample is that text: its interval would have no width, though nothing is known of others.

    Args:
        sums: (n,) sums per text.
        counts: (n,) what they are sums over.
        confidence: Two-sided confidence, in (0, 1).
        seed: Of the resampling.
        resamples: Number of resamples.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, None, None
    rng = np.random.default_rng(seed)
    # How often each text is drawn, which is all that a ratio of sums needs.
    drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)
    ratios = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return mean, float(low), float(high)


def _distance(first: torch.Tensor, second: torch.Tensor) -> TextDistance:
    """Compare (t, vocabulary) logits, a piece of the positions at a time."""
    kl, same = 0.0, 0
    for start in range(0, len(first), _POSITIONS):
        ours, theirs = first[start : start + _POSITIONS], second[start : start + _POSITIONS]
        log_p, log_q = ours.float().log_softmax(dim=-1), theirs.float().log_softmax(dim=-1)
        # A word that the reference rules out adds nothing, though its logarithm is infinite.
        terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
        kl += float(terms.sum(dim=-1).double().sum())
        same += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
    return TextDistance(kl, same, len(first))


def _logits(model: Any, rows: list[list[int]], before: int) -> torch.Tensor:
    """Return what follows every token of the rows but the first `before`, (rows, longest - before, vocabulary)."""
    longest = max(map(len, rows))
    # Behind a text nothing is looked at, so any token pads it.
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    seen = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    logits: torch.Tensor = model(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        use_cache=False,
        logits_to_keep=longest - before,  # of learned prompts in front there are none then, either
    ).logits
    return logits


@contextmanager
def _judging(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
