from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from components.align_ti import terms
from components.config import local_paths
from components.config.load import load_settings
from components.config.local_paths import missing_paths
from components.config.settings import FILES, Settings
from components.errors import SettingsError
from tests.align_ti.examples import named

ROOT = Path(__file__).parents[2]


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]
    return [path]


RAW = {file: yaml.safe_load((ROOT / "params" / f"{file}.yaml").read_text()) for file in FILES}
MAPPINGS = sorted({leaf[:depth] for leaf in leaves(RAW) for depth in range(1, len(leaf))}, key=str)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    return tmp_path


def put(root: Path, file: str, pattern: str, new: str) -> int:
    """Replace the first match in a params file and return its line."""
    path = root / "params" / f"{file}.yaml"
    text = path.read_text()
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in {path}"
    path.write_text(text[: match.start()] + new + text[match.end() :])
    return text[: match.start()].count("\n") + 1


def problems(root: Path) -> list[str]:
    with pytest.raises(SettingsError) as error:
        load_settings(root)
    return str(error.value).split("\n  ")[1:]


def test_the_shipped_params_are_valid() -> None:
    load_settings(ROOT)


def test_every_problem_of_every_file_is_named_with_file_line_and_key(root: Path) -> None:
    lines = [
        put(root, "data", r"grid: \d+", "grid: four"),
        put(root, "distill", r"(?s)batch_size: .*micro_batch_size: \d+", "batch_size: 64\nmicro_batch_size: 48"),
        put(root, "evaluate", "batch_size:", "batchsize:"),
        put(root, "study", "sft: 1.0", "sft: -1.0"),
    ]
    assert len(lines) == 4
    messages = problems(root)
    for expected in (
        f"params/data.yaml:{lines[0]}: digits.grid: Input should be a valid integer, not 'four'",
        f"params/distill.yaml:{lines[1]}: batch_size 64 is not a multiple of micro_batch_size 48",
        f"params/evaluate.yaml:{lines[2]}: batchsize: unknown key; did you mean 'batch_size'?",
        "params/evaluate.yaml:1: batch_size: required, and missing",
        f"params/study.yaml:{lines[3]}: arms.sft.weights.sft: Input should be greater than or equal to 0, not -1.0",
    ):
        assert expected in messages
    assert len(messages) == 5


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ('"1200"', "valid integer, not '1200'"),  # text is not a number,
        ("true", "valid integer, not True"),  # nor is yes,
        ("1200.5", "valid integer"),
        ("-1", "greater than 0"),
        ("", "valid integer, not null"),  # nor nothing
    ],
)
def test_values_are_not_converted_silently(root: Path, value: str, why: str) -> None:
    line = put(root, "distill", r"steps: \d+", f"steps: {value}")
    (problem,) = problems(root)
    assert problem.startswith(f"params/distill.yaml:{line}: steps: ")
    assert why in problem


def test_a_number_that_yaml_reads_as_text_says_how_to_write_it(root: Path) -> None:
    put(root, "distill", r"learning_rate: [^,]+", "learning_rate: 2e-3")
    (problem,) = problems(root)
    assert problem.endswith("not '2e-3'; YAML takes that for text, write 0.002")


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_not_a_number_is_refused(root: Path, value: str) -> None:
    put(root, "distill", r"learning_rate: [^,]+", f"learning_rate: {value}")
    (problem,) = problems(root)
    assert "finite number" in problem


@pytest.mark.parametrize("content", ["a: [1,", "- 1\n- 2\n", "", "!!python/object/apply:os.getcwd []", "\udcff"])
def test_a_file_that_is_no_mapping_is_named(root: Path, content: str) -> None:
    (root / "params/irs.yaml").write_bytes(content.encode("utf-8", "surrogateescape"))
    (problem,) = problems(root)
    assert "params/irs.yaml" in problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb:\n\tc: 1\n", ":3: not valid YAML: .*it is indented by a tab, write spaces"),
        ("a: [1\nb: 2\n", ":2: not valid YAML: while parsing a flow sequence"),
        ("a: 1\nb: *c\n", ":2: not valid YAML: found undefined alias"),
    ],
)
def test_what_yaml_cannot_parse_is_told_with_its_line(root: Path, content: str, message: str) -> None:
    (root / "params/irs.yaml").write_text(content)
    (problem,) = problems(root)
    assert re.search(rf"params/irs\.yaml{message}", problem), problem


def test_a_file_that_nothing_reads_is_told(root: Path) -> None:
    shutil.copy(root / "params/models.yaml", root / "params/modles.yaml")
    (root / "params/.#data.yaml").symlink_to("me@host")  # Emacs, of an unsaved file
    (problem,) = problems(root)
    assert problem == "params/modles.yaml: no file of params/, and never read; did you mean 'models.yaml'?"


def test_a_file_that_cannot_be_read_is_named(root: Path) -> None:
    (root / "params/irs.yaml").unlink()
    (root / "params/irs.yaml").mkdir()
    (problem,) = problems(root)
    assert "params/irs.yaml: cannot be read: is a directory" in problem


def test_a_missing_file_says_how_to_get_it_back(root: Path) -> None:
    (root / "params/irs.yaml").unlink()
    (problem,) = problems(root)
    assert "missing; `git checkout" in problem


@pytest.mark.parametrize("name", ["teacher", "k.d", "-kd", "KD", "a/b"])
def test_names_of_arms_that_cannot_be_stages_are_refused(root: Path, name: str) -> None:
    put(root, "study", "  kd:", f'  "{name}":')
    put(root, "evaluate", r"baselines: \[.*?\]", "baselines: [sft]")
    (problem,) = problems(root)
    assert problem.startswith("params/study.yaml:")


def test_no_image_is_stored_that_pillow_does_not_open(root: Path) -> None:
    put(root, "data", "max_pixels: [0-9_]+", f"max_pixels: {2 * int(Image.MAX_IMAGE_PIXELS or 0) + 1}")
    (problem,) = problems(root)
    assert "limits.max_pixels: " in problem and "less than or equal to 178956970" in problem


def test_a_caption_describes_whole_patches(root: Path) -> None:
    put(root, "models", "cell_px: 16", "cell_px: 12")
    (problem,) = problems(root)
    assert problem.endswith("embedded.tower: cell_px 12 is not a multiple of patch_px 8")


def test_an_unknown_loss_term_is_told_with_those_there_are(root: Path) -> None:
    line = put(root, "study", "kd: 1.0", "kdd: 1.0")
    (problem,) = problems(root)
    assert problem.startswith(
        f"params/study.yaml:{line}: arms.kd.weights.kdd: there is no loss term 'kdd'; did you mean 'kd'? "
    )
    assert ", kd," in problem


@pytest.mark.parametrize("name", ["no", "off", "1", "1e3", "0x1f", "2024-01-01", "null", "~", "1_0"])
def test_a_name_that_yaml_takes_for_something_else_is_said_where_it_stands(root: Path, name: str) -> None:
    line = put(root, "study", "align_ti:", f"{name}:")
    (problem,) = problems(root)
    assert f"/params/study.yaml:{line}: {name}: YAML takes it for " in problem
    assert f'write "{name}"' in problem


@pytest.mark.parametrize("value", ["yes", "12", "2024-01-01"])
def test_a_value_that_yaml_takes_for_something_else_says_so(root: Path, value: str) -> None:
    line = put(root, "study", "student: student", f"student: {value}")
    (problem,) = problems(root)
    assert problem.startswith(f"params/study.yaml:{line}: arms.sft.student: ") and problem.endswith(
        "unless it stands in quotes"
    )


@pytest.mark.parametrize(
    ("file", "below", "twice"),
    [
        ("distill", r"steps: \d+", "steps: 3"),
        ("study", "seed: 1", "seed: 2"),
        ("study", "weights: {sft: 1.0", "weights: {sft: 1.0, sft: 0.0"),
        ("study", "  align_ti:", "  sft: {}\n  align_ti:"),
    ],
)
def test_a_key_that_stands_twice_is_named(root: Path, file: str, below: str, twice: str) -> None:
    """At any depth; the last one would win in silence."""
    path = root / f"params/{file}.yaml"
    match = re.search(below, path.read_text())
    assert match
    indent = "    " if match[0].startswith("seed") else ""
    put(root, file, below, twice if "{" in twice else f"{match[0]}\n{indent}{twice}")
    (problem,) = problems(root)
    assert re.search(rf"/params/{file}.yaml:\d+: \w+: stands twice, here and in line \d+", problem), problem


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"steps: \d+", "steps: 0400", "0400: YAML takes it for 256"),
        (r"steps: \d+", "steps: 6:40", "6:40: YAML takes it for 400"),
        (r"learning_rate: [^,]+", "learning_rate: 1:30.5", "1:30.5: YAML takes it for 90.5"),
        (r"learning_rate: [^,]+", "learning_rate: 1,5", "1,5: a comma stands between two keys; write 1.5"),
        (r"learning_rate: [^,]+", "learning_rate: 1,5e-4", "1,5e-4: a comma stands between two keys; write 1.5e-4"),
        (r"learning_rate: [^,]+", "learning_rate: 1,000", "1,000: a comma stands between two keys, not in a number"),
        (r"learning_rate: [^,]+", "learning_rate: 1.0,5", "1.0,5: a comma stands between two keys, not in a number"),
        ("steps:", f"deep: {'[' * 5000}{']' * 5000}\nsteps:", "deep: unknown key"),
        ("steps:", f"many: {'9' * 5000}\nsteps:", "not valid YAML: Exceeds the limit"),
    ],
)
def test_what_yaml_reads_as_nobody_means_it_is_told(root: Path, old: str, new: str, message: str) -> None:
    put(root, "distill", old, new)
    (problem,) = problems(root)
    assert message in problem


def test_a_folder_that_is_no_project_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has no params/: run it in the folder of a project") as raised:
        load_settings(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("seed", [-1, 20_261_129_131_500, 2**64])
def test_a_seed_that_no_generator_takes_is_refused_before_anything_runs(root: Path, seed: int) -> None:
    line = put(root, "study", "seed: 1", f"seed: {seed}")
    (problem,) = problems(root)
    assert problem.startswith(f"params/study.yaml:{line}: arms.sft.seed: ")


USER_KEYS = {
    ("study", "arms"),
    ("models", "embedded", "teachers"),
    ("models", "embedded", "students"),
    ("data", "digits", "palette"),
}


@pytest.mark.parametrize("where", [keys for keys in MAPPINGS if keys not in USER_KEYS and keys[-1] != "weights"], ids=".".join)
def test_a_typo_anywhere_is_named_with_its_line_and_what_was_meant(root: Path, where: tuple[str, ...]) -> None:
    """In what a user names as well: arms, teachers, students."""
    file, *steps = where
    path = root / f"params/{file}.yaml"
    raw = yaml.safe_load(path.read_text())
    node = raw
    for step in steps:
        node = node[step]
    key = next(iter(node))
    node[f"{key}z"] = node.pop(key)
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    line = path.read_text()[: path.read_text().index(f"{key}z")].count("\n") + 1
    expected = f"params/{file}.yaml:{line}: {'.'.join([*steps, f'{key}z'])}: unknown key; did you mean {key!r}?"
    assert expected in problems(root)


def test_what_is_named_and_not_here_is_listed_with_its_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (root / "mine").mkdir()
    (root / "mine/a.tar").touch()
    changes = {
        "data": {"source": "llava", "llava": {"annotations": "mine/x.json", "images": "mine/*.tar", "val": 0.1, "test": 0.1}},
        "models": {
            "family": "pretrained",
            "pretrained": {
                "teachers": {"large": {"source": "larg", "revision": None}, "hub": {"source": "a/b", "revision": "0" * 40}},
                "students": {
                    "student": {
                        "tower": {"source": "mine", "revision": None},
                        "language_model": {"source": "words", "revision": None},
                        "feature_layer": -2,
                        "seed": 1,
                    }
                },
            },
        },
    }
    assert missing_paths(load_settings()) == []
    for file, values in changes.items():
        path = root / f"params/{file}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))
    assert missing_paths(load_settings()) == [
        "data.llava.annotations: mine/x.json",
        "models.pretrained: large: larg",
        "models.pretrained: student.language_model: words",
    ]


@pytest.mark.parametrize("pattern", ["x/*/0.tar", "x/a/[0-9].tar", "x/a/?.tar", "x/**/*.tar"])
def test_a_pattern_is_there_if_a_file_matches_it(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not local_paths.exists(Path(pattern))
    (tmp_path / "x/a").mkdir(parents=True)
    (tmp_path / "x/a/0.tar").touch()
    assert local_paths.exists(Path(pattern)) and local_paths.exists(tmp_path / pattern)


def test_folders_of_benchmarks_images_are_paths(root: Path) -> None:
    sources = {"own": {"files": "x.json", "images": "x", "weight": 1.0, "licence": "own"}}
    mixture = {"val": 0.1, "test": 0.1, "near_duplicates": "drop", "evaluation_images": ["x/pope"], "sources": sources}
    path = root / "params/data.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "source": "mixture", "mixture": mixture}))
    mixture_settings = load_settings(root).data.mixture
    assert mixture_settings is not None and mixture_settings.evaluation_images == [Path("x/pope")]


def test_arms_and_baselines_must_name_what_exists(root: Path) -> None:
    student = put(root, "study", "student: student", "student: stud")
    baselines = put(root, "evaluate", r"baselines: \[.*?\]", "baselines: [sft, kdd]")
    assert problems(root) == [
        f"params/study.yaml:{student}: arms.sft.student: 'stud' is none of the students of params/models.yaml (student)",
        f"params/evaluate.yaml:{baselines}: baselines: 'kdd' is no arm of params/study.yaml",
    ]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("iva: {rows: 0}", "iva.rows: Input should be greater than 0, not 0"),
        ("iva: {rows: 0}", "iva: required, and missing: weighting, layer; an arm's block stands whole: copy that of"),
        ("weights: 4\n    student: student\n    seed: 1\n  other:", "weights: takes a block of names and values, not 4"),
        ("rollouts: 4", "rollouts: takes a block of share, temperature, top_p, max_new_tokens, reuse, not 4"),
        ("iva: {weighting: layer, layer: 99}", "iva.layer: 99, but the teacher has layers 0..2"),
    ],
)
def test_an_arms_block_is_refused_in_the_words_of_the_files(root: Path, block: str, message: str) -> None:
    line = put(root, "study", r"sft:\n", f"sft:\n    {block}\n") + 1
    messages = problems(root)
    assert any(f"params/study.yaml:{line}: arms.sft.{message}" in text for text in messages) and len(messages) <= 2


@pytest.mark.parametrize("betas", ["[]", "[0.9]"])
def test_a_list_that_is_too_short_says_what_it_wants(root: Path, betas: str) -> None:
    line = put(root, "distill", r"betas: \[.*\]", f"betas: {betas}")
    assert problems(root) == [f"params/distill.yaml:{line}: optimiser.betas: too short: 2 values are wanted"]


def test_a_beta_that_adamw_does_not_take_is_refused(root: Path) -> None:
    line = put(root, "distill", r"betas: \[.*\]", "betas: [0.9, 1.0]")
    (problem,) = problems(root)
    assert problem.startswith(f"params/distill.yaml:{line}: optimiser.betas.1: Input should be less than 1")


def test_a_layer_is_one_of_a_local_checkpoint(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"num_hidden_layers": 2}}')
    pretrained(root, {"base": {"source": str(tmp_path), "revision": None}}, {})
    line = put(root, "distill", r"weighting: searched, layer: null", "weighting: layer, layer: 2")
    assert problems(root) == [f"params/distill.yaml:{line}: iva.layer: 2, but the teacher has layers 0..1"]
    pretrained(root, {"base": {"source": "org/model", "revision": "0" * 40}}, {})  # what the hub has is seen by `distill`
    load_settings(root)


def test_an_arm_takes_what_it_does_not_set_from_distill() -> None:
    shipped = load_settings(ROOT)
    arm = shipped.arm("kd_uniform")
    assert arm.iva is not None and arm.iva.weighting == "uniform"
    assert (arm.tpa, arm.divergence) == (shipped.distill.tpa, shipped.distill.divergence)
    with pytest.raises(SettingsError, match="no arm 'kd_unifrom'; it has sft, kd"):
        shipped.arm("kd_unifrom")


def test_runtime_fields_come_from_the_environment_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DEVICE": "cpu", "THREADS": "7", "TRACKING_URI": "journal", "EXPERIMENT": "x", "STEPS": "1"}.items():
        monkeypatch.setenv(f"ALIGNTI_{name}", value)
    loaded = load_settings(ROOT)
    runtime = loaded.runtime
    assert (runtime.device, runtime.threads, runtime.tracking_uri, runtime.experiment) == ("cpu", 7, "journal", "x")
    monkeypatch.setenv("ALIGNTI_THREADS", "many")
    with pytest.raises(SettingsError, match=r"  ALIGNTI_THREADS: .*not 'many'"):
        load_settings(ROOT)


CHECKPOINT = {"source": "x", "revision": None}
PARTS = {"tower": CHECKPOINT, "language_model": CHECKPOINT, "feature_layer": -2, "seed": 1}
CUT = {"teacher": "base", "every": 2, "mlp": None}


def pretrained(root: Path, teachers: dict[str, Any], students: dict[str, Any]) -> None:
    path = root / "params/models.yaml"
    family = {"teachers": teachers, "students": {"student": CHECKPOINT, **students}}
    values = {"family": "pretrained", "embedded": None, "pretrained": family}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values, sort_keys=False))


def test_a_model_is_a_checkpoint_or_parts_or_cut_from_a_teacher(root: Path) -> None:
    pretrained(root, {"base": PARTS}, {"whole": CHECKPOINT, "made": PARTS, "cut": CUT})
    family = load_settings(root).models.pretrained
    assert family is not None
    assert [type(student).__name__ for student in family.students.values()] == ["Checkpoint", "Checkpoint", "Parts", "Cut"]


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (
            CHECKPOINT,
            {"source": "x", "tower": CHECKPOINT},
            r"students.s: has source \(checkpoint\) and tower \(parts\); give {so",
        ),
        (CUT, CHECKPOINT, r"teachers.base: has teacher, every, mlp \(cut\); give {source, revision} or {tower, lan[^{]*$"),
        (CHECKPOINT, {**PARTS, "towr": 1}, "students.s.towr: unknown key; did you mean 'tower'"),
        (
            CHECKPOINT,
            {**PARTS, "tower": {**CHECKPOINT, "revison": None}},
            "s.tower.revison: unknown key; did you mean 'revision'",
        ),
        (CHECKPOINT, {"source": "x"}, "students.s.revision: required, and missing"),
        (CHECKPOINT, {**CUT, "every": 0}, "students.s.every: .*greater than 0, not 0"),
        (CHECKPOINT, {**CUT, "teacher": "bas"}, r"students.s.teacher: 'bas' is none of the teachers \(base\)"),
        (CHECKPOINT, "org/model", "students.s: .*not 'org/model'"),
    ],
)
def test_of_an_entry_that_is_none_of_the_three_one_sentence_says_what_is_wrong(
    root: Path, teacher: Any, student: Any, message: str
) -> None:
    pretrained(root, {"base": teacher}, {"s": student})
    (problem,) = problems(root)
    assert problem.startswith("params/models.yaml:") and re.search(message, problem), problem
    assert "(parts)." not in problem


def test_the_first_stage_has_captions_and_no_teacher(root: Path) -> None:
    put(root, "distill", "stage: distill", "stage: align")
    (problem, *_) = problems(root)
    assert "stage: align is for `family: pretrained`" in problem
    pretrained(root, {"base": CHECKPOINT}, {})
    put(root, "distill", "source: live", "source: cache")
    problem, *arms = problems(root)[:-1]
    assert problem.endswith(": pretrained.teachers: stage align has none, and here are base; set it to {}")
    assert "teacher_signals.source: cache" in arms.pop(0)
    assert ": arms.kd.weights: kd ask a teacher, and stage align has none; set all but sft to 0" in arms[0]
    assert "arms.sft" not in " ".join(arms)
    pretrained(root, {}, {})
    put(root, "distill", "source: cache", "source: live")
    put(root, "study", r"(?s)  kd:.*", "")
    put(root, "evaluate", r"baselines: \[.*?\]", "baselines: [sft]")
    assert load_settings(root).distill.stage == "align"
    written = "teacher_answers: {samples: 1, temperature: 0.0, top_p: null, max_new_tokens: 8}"
    put(root, "distill", "teacher_answers: null", written)
    assert problems(root)[0].endswith(": teacher_answers: a teacher's, and stage align has none; set it to null")
    put(root, "distill", re.escape(written), "teacher_answers: null")
    put(root, "distill", "stage: align", "stage: distill")
    (problem,) = problems(root)
    assert problem.endswith(": pretrained.teachers: {} is for `stage: align`; name a teacher")


def test_a_learning_rate_is_of_a_part_that_is_trained(root: Path) -> None:
    put(root, "distill", "learning_rates: {vision_tower: null", "learning_rates: {vision_tower: 1.0e-6")
    (problem,) = problems(root)
    assert "learning_rates.vision_tower is 1e-06, and trainable.vision_tower is false" in problem


@settings(max_examples=40)
@given(st.sampled_from(MAPPINGS), st.text("abcdefgh_", min_size=12, max_size=12))
def test_an_unknown_key_anywhere_is_refused(where: tuple[str, ...], key: str) -> None:
    raw: Any = yaml.safe_load(yaml.safe_dump(RAW))
    node = raw
    for step in where:
        node = node[step]
    node[key] = 1
    with pytest.raises(ValueError, match=key):
        Settings.model_validate(raw)


def test_no_field_has_a_hidden_default_but_what_an_arm_may_leave_to_distill() -> None:
    pending: list[type[BaseModel]] = [Settings]
    hidden = set()
    while pending:
        model = pending.pop()
        for name, field in model.model_fields.items():
            if not field.is_required():
                hidden.add(f"{model.__name__}.{name}")
            parts = [field.annotation]
            while parts:
                part = parts.pop()
                if isinstance(part, type) and issubclass(part, BaseModel):
                    pending.append(part)
                parts += getattr(part, "__args__", ())
    of_arm = {f"Arm.{key}" for key in ("iva", "tpa", "divergence", "steps", "answers", "answer_filter", "rollouts")}
    assert hidden == of_arm | {"Iva.divergence", "Iva.change", "Iva.rows", "Tpa.divergence", "Tpa.alternatives"}


def test_what_dvc_reads_is_what_we_read() -> None:
    """DVC parses params by YAML 1.2, this project by 1.1: a value that the two see differently would go stale unseen."""
    from dvc.utils.serialize import load_yaml

    for file in FILES:
        dvc_values = load_yaml(str(ROOT / "params" / f"{file}.yaml"))
        assert repr(dvc_values) == repr(RAW[file])


def test_compiled_layers_that_a_term_reads_inside_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    term_names = [*terms.names(), "attention"]
    named(monkeypatch)
    monkeypatch.setattr(terms, "names", lambda: term_names)
    put(root, "study", "weights: {sft: 1.0, kd: 1.0}", "weights: {sft: 1.0, attention: 1.0}")
    load_settings(root)
    put(root, "distill", "compile: false", "compile: true")
    (problem,) = problems(root)
    assert re.match(r"params/distill.yaml:\d+: compile: arms.kd has attention, which read inside the student's layers", problem)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("evaluate", r"baselines: \[.*\]", "baselines: [kd, kd]", "baselines: kd stands more than once"),
        ("distill", "evidence: null", "evidence: {kinds: [blank, blank], share: 0.5}", "blank stands more than once"),
        ("irs", r"images: \d+", "images: 1", "images: Input should be greater than or equal to 2"),
        ("distill", r"\bbatch_size: \d+", "batch_size: 1000000000", "less than or equal to 1048576"),
        ("distill", r"draw_temperature: [\d.]+", "draw_temperature: 1.0e-38", "greater than or equal to 0.000001"),
        ("distill", r"(?<=0.5, )temperature: 1.0", "temperature: 1.0e+9", "less than or equal to 1000"),
        (
            "distill",
            "teacher_answers: null",
            "teacher_answers: {samples: 1, temperature: 1.0e-38, top_p: null, max_new_tokens: 9}",
            "must be 0 (greedy) or at least 1e-06",
        ),
    ],
)
def test_repeats_and_numbers_that_no_training_reaches_are_refused(
    root: Path, file: str, old: str, new: str, message: str
) -> None:
    put(root, file, old, new)
    assert any(message in problem for problem in problems(root)) and "not [" not in str(problems(root))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iva": {"weighting": "gradient", "layer": None}}, "which takes a live teacher: set teacher_signals.source to live"),
        ({"iva": {"weighting": "layer", "layer": "middle"}}, "give the cache its number"),
        ({"tpa": {"source": "gold", "alternatives": "wrong"}}, "of a source other than gold"),
    ],
)
def test_controls_that_have_nothing_to_work_on_are_refused(root: Path, values: dict[str, Any], message: str) -> None:
    path = root / "params/distill.yaml"
    document = yaml.safe_load(path.read_text())
    document["teacher_signals"]["source"] = "cache"
    for block, changes in values.items():
        document[block] |= changes
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(SettingsError, match=message):
        load_settings(root)
