"""Names of studies: hyphens, refusals, and a question for each."""

from __future__ import annotations

import pytest

from subnet_ft.errors import SubnetError
from subnet_ft.studies.names import QUESTIONS, study_name
from subnet_ft.studies.plans import _PLANS


@pytest.mark.parametrize("text", ["which_mask", "which-mask"])
def test_study_name_takes_hyphens_for_underscores(text: str) -> None:
    assert study_name(text) == "which_mask"


@pytest.mark.parametrize(
    ("text", "hint"), [("sparcity", "did you mean `sparsity`?"), ("weather", "Studies: sparsity, overlap, causes")]
)
def test_study_name_refuses_others_with_what_there_is(text: str, hint: str) -> None:
    with pytest.raises(SubnetError, match=f"`{text}` is no study") as caught:
        study_name(text)
    assert hint in str(caught.value)


def test_every_study_has_a_question_and_a_plan() -> None:
    assert list(QUESTIONS) == list(_PLANS)
    assert all(question.endswith("?") for question in QUESTIONS.values())
