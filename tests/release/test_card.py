"""The model card: the same bytes each time when the student is made, and all that is known when it is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from components.distill.card import END, NOT_STATED, START, licence_of, model_card
from components.errors import DataError, ModelError
from components.io import write_text
from components.records.compare import ArmResult, Comparison, Contrast, Difference, TeacherResult
from components.records.dataset import SourceRecord, Sources
from components.records.models import ModelIndex
from components.records.paths import DATASET, MODELS, REPORTS, STUDENTS
from components.release.card import full_card
from components.tracking import provenance
from components.tracking.journal import JOURNALS
from components.tracking.system_metrics import CPU_WH, GPU_WH
from tests.release.conftest import COMMIT, facts

ARM = STUDENTS / "align_ti"


def test_the_first_card_is_valid_and_the_same_each_time(project: Path) -> None:
    text = model_card("align_ti", facts())
    assert text == model_card("align_ti", facts()) == (ARM / "model/README.md").read_text()
    front = ModelCard(text).data.to_dict()
    assert front["base_model"] == ["org/small", "org/large"] and front["library_name"] == "transformers"
    assert front["licences_of_inputs"] == {
        "student before it": "apache-2.0", "teacher": "large-community", "data": "CC0, by me."
    }  # fmt: skip
    for part in (
        "Loss: L = L_sft + 0.5 L_kd + L_iva. L_iva weighs",
        "layer l* = 1 of the teacher",
        "My cats: 2 training samples about 2 images",
        f"`org/large` at `{COMMIT[:12]}`",
        "800 steps of 32 samples, learning rate 0.001, fp32; trained: projector, language model.",
    ):
        assert part in text
    assert START + json.dumps(facts(), indent=2, sort_keys=True) + END in text
    assert COMMIT not in text.replace(COMMIT[:12], ""), "no commit of ours: it would change the bytes"


def test_licences_that_nobody_stated_are_said_not_to_be(project: Path) -> None:
    record = ModelIndex.read(MODELS / "index.json").teachers["base"]
    readme = Path(record.path) / "README.md"
    for text in ("", "no front matter\n---\n", "---\n: [\n---\n", "---\ntags: [x]\n---\n", "---\n- a list\n---\n"):
        readme.write_text(text)
        assert licence_of(record) == NOT_STATED
    readme.unlink()
    assert licence_of(record) == NOT_STATED
    (DATASET / "card.md").unlink()
    assert f"{NOT_STATED}\n\n## How" in model_card("align_ti", facts())


def test_a_folder_of_ones_own_is_named_without_where_it_lies(project: Path) -> None:
    index = ModelIndex.read(MODELS / "index.json")
    local = index.students["student"].model_copy(update={"origin": "/home/ann/secret/mine", "revision": None})
    index.model_copy(update={"students": {"student": local}}).write(MODELS / "index.json")
    text = model_card("align_ti", facts())
    assert "`mine`" in text and "ann" not in text
    assert ModelCard(text).data.to_dict()["base_model"] == ["org/large"]


def test_a_model_aligned_on_captions_has_no_teacher_on_its_card(project: Path) -> None:
    text = model_card("align_ti", facts(teacher=None, irs_layer=None, distill={**facts()["distill"], "stage": "align"}))
    assert "| teacher |" not in text and "cross-entropy on the captions alone" in text
    assert ModelCard(text).data.to_dict()["base_model"] == ["org/small"]


def test_a_control_and_answers_of_the_teacher_are_told(project: Path) -> None:
    arm = facts()["arm"] | {"answers": "teacher"}
    arm["iva"] |= {"change": "other_instruction"}
    told = "the layer search's; a control: other instruction. The answers are the teacher's.\n"
    assert told in model_card("align_ti", facts(arm=arm))


def test_a_part_of_the_samples_is_not_given_out_as_all(project: Path) -> None:
    text = model_card("align_ti", facts(distill=facts()["distill"] | {"rows": 1}))
    assert "2 training samples about 2 images, at most 1 of them trained on, `dddd" in text


def test_a_mixture_names_each_sources_licence(project: Path) -> None:
    sources = {
        name: SourceRecord(weight=1, licence=licence, files="x", rows=2) for name, licence in {"a": "MIT", "b": "CC0"}.items()
    }
    Sources(sources=sources).write(DATASET / "sources.json")
    front = ModelCard(model_card("align_ti", facts())).data.to_dict()
    assert front["licences_of_inputs"]["data"] == {"a": "MIT", "b": "CC0"}


def comparison() -> Comparison:
    """One arm of 84.1%, its gain over `kd` within the noise."""
    interval = (0.8255, 0.8565)
    scores: dict[str, Any] = {
        "exact_match": 0.841, "ci95": interval, "average": 0.84, "average_ci95": interval,
        "per_kind": {"digit_at": 0.841}, "per_kind_ci95": {"digit_at": interval}, "yes_no": {}, "measures": {},
    }  # fmt: skip
    gain = Difference(arm="align_ti", against="kd", difference=-0.001, ci95=(-0.011, 0.009), p_value=0.9, p_holm=1)
    cost: dict[str, Any] = {
        "train_seconds": 90.4,
        "peak_memory_mib": 1036.2,
        "device": "cpu",
        "steps": 800,
        "step_seconds": 0.11,
    }
    runs = {"align_ti": 0.841}
    arm = ArmResult(**scores, **cost, runs=runs, share_of_teacher=0.95, share_ci95=interval, gains={"kd": gain})
    return Comparison(
        headline="", standing="", split="test", n=2000, images=500, kinds={"digit_at": 2000}, confidence=0.95, resamples=100,
        method="Percentile intervals of a cluster bootstrap.", teacher=TeacherResult(**scores), arms={"align_ti": arm},
        order=["align_ti"], exact_match=Contrast(pairs=[], noise=None, detectable=None, spread=None), measures={},
    )  # fmt: skip


def locked(arm_digest: str, model_digest: str) -> None:
    """dvc.lock, the journal of the run that made the student, and the note of who made what."""
    stages = {
        "prepare": {"outs": [{"path": "artifacts/dataset", "md5": "11.dir"}]},
        "distill@align_ti": {"outs": [{"path": str(ARM), "md5": arm_digest}]},
        "evaluate@align_ti": {"deps": [{"path": str(ARM / "model"), "md5": model_digest}], "outs": []},
    }
    write_text(Path("dvc.lock"), yaml.safe_dump({"stages": stages}))
    events = [
        {"event": "start", "tags": {"mlflow.source.git.commit": COMMIT}},
        {"event": "origin", "params": {}, "uncommitted": []},
        {"event": "metrics", "step": None, "values": {GPU_WH: 1.25, CPU_WH: 0.5}},
    ]
    write_text(JOURNALS / "run-1.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    provenance.note_maker(provenance.digest(ARM).md5, "run-1")


@pytest.fixture
def compared(project: Path) -> Comparison:
    locked(provenance.digest(ARM).md5, provenance.digest(ARM / "model").md5)
    comparison().write(REPORTS / "compare.json")
    return comparison()


def test_a_student_without_its_card_is_told_and_odd_bytes_are_no_fault(compared: Comparison) -> None:
    card = ARM / "model/README.md"
    card.write_bytes(card.read_bytes() + b"\xff")
    assert full_card("align_ti", Path("out"), "fp32")[0].endswith("\N{REPLACEMENT CHARACTER}")
    card.write_text("---\na: [\n---\n")
    with pytest.raises(ModelError, match=r"README\.md is damaged; `dvc repro distill@align_ti`"):
        full_card("align_ti", Path("out"), "fp32")
    card.unlink()
    with pytest.raises(DataError, match=r"README\.md is missing; `dvc repro` makes it"):
        full_card("align_ti", Path("out"), "fp32")


def test_the_full_card_has_scores_cost_and_the_way_to_make_it_again(compared: Comparison) -> None:
    text, missing = full_card("align_ti", Path("out/mine"), "bf16")
    assert missing == []
    card, result = ModelCard(text), compared.arms["align_ti"]
    (value,) = card.data.to_dict()["model-index"][0]["results"]
    assert value["dataset"]["split"] == compared.split
    assert (value["metrics"][0]["type"], value["metrics"][0]["value"]) == ("exact_match", result.exact_match)
    assert "| **all** | 2,000 | **84.1% (82.5 to 85.7)** |" in text
    assert "800 steps in 90 s on cpu, at most 1,036 MiB. Energy: 1.25 Wh of the GPUs and 0.5 Wh of the processors." in text
    assert f"git checkout {COMMIT}\ndvc repro distill@align_ti\nalignti export align_ti mine --dtype bf16\n" in text
    assert "alignti reproduce run-1" in text
    assert f"| `{ARM}` | `{provenance.digest(ARM).md5}` |" in text and "| `artifacts/dataset` | `11.dir` |" in text
    assert 'from_pretrained("mine")' in text and '"irs_layer": 1,' in text
    assert "- Over kd: -0.1 points (-1.1 to +0.9), not more than the noise." in text


def test_one_of_several_seeds_has_the_arms_figures_and_its_own_score(compared: Comparison) -> None:
    arm = compared.arms["align_ti"].model_copy(update={"runs": {"first": 0.85, "align_ti": 0.832}})
    compared.model_copy(update={"arms": {"first": arm}, "order": ["first"]}).write(REPORTS / "compare.json")
    text, missing = full_card("align_ti", Path("out"), "bf16")
    assert missing == [] and "**84.1% (82.5 to 85.7)**" in text
    assert "Means over 2 seeds; this student's own exact match: 83.2%." in text
    (value,) = ModelCard(text).data.to_dict()["model-index"][0]["results"]
    assert value["metrics"][0]["value"] == 0.832 and "over 2 seeds" in value["metrics"][0]["name"]


def test_scores_hashes_and_runs_of_other_weights_are_not_taken_for_these(compared: Comparison) -> None:
    (ARM / "model/extra.txt").write_text("other bytes")
    text, missing = full_card("align_ti", Path("out"), "fp32")
    assert "## Scores\n\nNot measured." in text and "model-index" not in text
    assert "Commit `not known`" in text and "Energy: not measured" in text and "11.dir" not in text
    assert [line.partition(":")[0] for line in missing] == ["scores", "the commit", "DVC's hashes"]


@pytest.mark.parametrize(
    ("recipe", "lines"),
    [
        ("smoke", "alignti use smoke\ndvc repro"),
        ("smoke with 2 value(s) changed", "alignti use smoke\n# then set in params/*.yaml what is said below"),
        ("", "# then set in params/*.yaml what is said below"),
    ],
)
def test_the_commands_restore_params_and_take_names_with_spaces(recipe: str, lines: str, compared: Comparison) -> None:
    start, origin, *rest = map(json.loads, (JOURNALS / "run-1.jsonl").read_text().splitlines())
    start["tags"]["recipe"], origin["params"] = recipe, {"params/distill.yaml": "steps: 4"}
    (JOURNALS / "run-1.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (start, origin, *rest)))
    text, missing = full_card("align_ti", Path("out/my own"), "bf16")
    assert f"git checkout {COMMIT}\n{lines}" in text and "alignti export align_ti 'my own' --dtype bf16" in text
    assert missing == [f"a commit of all that ran: params/distill.yaml differed from {COMMIT}"]


def test_code_that_was_not_committed_is_named(compared: Comparison) -> None:
    journal = JOURNALS / "run-1.jsonl"
    journal.write_text(journal.read_text().replace('"uncommitted": []', '"uncommitted": ["components/x.py"]'))
    text, missing = full_card("align_ti", Path("out"), "fp32")
    assert missing == [f"a commit of all that ran: components/x.py differed from {COMMIT}"]
    assert "but with other components/x.py" in text
