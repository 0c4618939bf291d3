"""The reference cases through the built engines, as `ming-trt golden --only speech --strict` does it."""

from pathlib import Path

from ming_trt.golden.replay import replay

GENERATION = Path(__file__).parents[1] / "data" / "golden" / "generation"


def test_all_cases(work: Path) -> None:
    outcome = replay([GENERATION / "checkpoint"], GENERATION, work, only="speech")
    assert not outcome.failures(strict=True)
    assert len(outcome.rows) >= 85 and sum(row.route == "engine" for row in outcome.rows) >= 40
    # what needs the LLM is in another checkpoint
    assert {case.case for case in outcome.not_run} == {"e2e.speech", "talker.merged"}
