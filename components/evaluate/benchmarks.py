"""Table of benchmarks: the paper's six, and those that its reviewers asked for.

Unconfirmed facts are left out and listed in `open_points`. Sources, all public: the authors' evaluation code
(shells/eval and alignti/eval of github.com/lchen1019/Align-TI), LLaVA's docs/Evaluation.md, VLMEvalKit's dataset classes
(names, addresses, prompts; ms-vlmeval 0.0.20), and the data sets' cards on the Hugging Face hub (sizes, licences).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Metric = Literal[
    "exact", "vqa_m4c", "relaxed", "ocrbench",
    "choice_scienceqa", "choice_vlmeval", "choice_circular", "pope", "mme", "hallusion",
]  # fmt: skip

SHORT = "{question}\nAnswer the question using a single word or phrase."
LETTER = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
KIT_CHOICE = "Question: {question}\nOptions:\n{options}\nPlease select the correct answer from the options above. \n"
SERVER = "https://opencompass.openxlab.space/utils"
CARD = "its dataset card states no licence"


class Benchmark(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    title: str
    in_paper: bool = False
    kit_dataset: str  # VLMEvalKit's name of the data set
    split: str
    items: int | None = None  # questions
    prompt: str = KIT_CHOICE  # prompt template, the paper's for its six benchmarks, else the kit's
    metric: Metric = "choice_vlmeval"
    rule: str = "VLMEvalKit's `can_infer`, no judge"  # published rule behind `metric`
    licence: str | None = None
    folder: str | None = "VLMEval"  # of the kit's file on SERVER; None: the kit builds the data set from the hub
    open_points: tuple[str, ...] = ()

    @property
    def independent(self) -> int | None:
        """Number of independent questions behind the score; None if unknown, or if the score is no share of questions."""
        return None if self.metric in ("mme", "choice_circular", "hallusion") else self.items

    @property
    def get(self) -> str:
        """Download command, or a note where the kit fetches the data itself."""
        if self.folder is None:
            return f"VLMEvalKit fetches it from the Hugging Face hub when it builds the data set {self.kit_dataset}"
        return f"curl -fL -o $LMUData/{self.kit_dataset}.tsv {SERVER}/{self.folder}/{self.kit_dataset}.tsv"


BENCHMARKS: dict[str, Benchmark] = {
    "gqa": Benchmark(
        title="GQA", in_paper=True, kit_dataset="GQA_TestDev_Balanced", split="testdev-balanced", items=12_578, prompt=SHORT,
        metric="exact", rule="equal to the answer, case and final period aside (convert_gqa_for_eval.py, eval_gqa_1.py)",
        open_points=(
            "licence: mirrors state MIT; GQA's own terms were not found",
            "size: of the kit's file not found",
            "VLMEvalKit compares without dropping the final period, so its score can be lower",
        ),
    ),
    "sqa": Benchmark(
        title="ScienceQA-IMG", in_paper=True, kit_dataset="ScienceQA_TEST", split="test, questions with an image", items=2_017,
        prompt=LETTER, metric="choice_scienceqa", rule="eval_science_qa.py: a letter, `A. ...`, or once `The answer is A.`",
        folder="benchmarks/ScienceQA",
        open_points=(
            f"licence: {CARD}",
            "size: of the kit's file not found",
            "prompt: the paper's question file (llava_test_CQM-A.json) was not seen; its name says context, question, options",
            "template: the authors ask ScienceQA under conversation mode v1, the other five under mode qwen",
        ),
    ),
    "textvqa": Benchmark(
        title="TextVQA", in_paper=True, kit_dataset="TextVQA_VAL", split="val 0.5.1", items=5_000,
        prompt="{question}\nReference OCR token: {ocr}\nAnswer the question using a single word or phrase.", metric="vqa_m4c",
        rule="VQA accuracy over ten answers, normalised as m4c_evaluator.py does", licence="CC BY 4.0",
        open_points=(
            "size: of the kit's file not found",
            "VLMEvalKit asks without OCR tokens and normalises as the official evaluator (metric `vqa`): a score of its own",
        ),
    ),
    "pope": Benchmark(
        title="POPE", in_paper=True, kit_dataset="POPE", split="random, popular, adversarial", items=9_000, prompt=SHORT,
        metric="pope", rule="eval_pope.py: no if the first sentence holds No, no or not, else yes; the mean of three F1",
        open_points=(
            f"licence: {CARD}",
            "size: of the kit's file not found",
            "items: of lmms-lab/POPE; LLaVA's question file may leave out a few of the random split",
            "prompt: LLaVA's documented short-answer form; the question file itself was not seen",
            "VLMEvalKit reads answers by words and takes one F1 over all (metric `pope_vlmeval`): a score of its own",
        ),
    ),
    "mme": Benchmark(
        title="MME perception", in_paper=True, kit_dataset="MME", split="perception, ten tasks", prompt=SHORT, metric="mme",
        rule="calculation.py: per task accuracy + accuracy+; the paper states perception / 2000 x 100",
        open_points=(
            "items: a card shows 2.37k rows for all fourteen tasks; the number of perception questions was not found",
            "licence: given on request by the authors; its text was not found",
            "size: of the kit's file not found; images of lmms-lab/MME are 865 MB",
            "VLMEvalKit asks the bare question and reads answers by words",
        ),
    ),
    "mmb": Benchmark(
        title="MMBench", in_paper=True, kit_dataset="MMBench_DEV_EN", split="dev", items=4_329, prompt="{hint}\n" + LETTER,
        metric="choice_circular",
        rule="right only if answered right in every order of the options; the paper's figure is from the evaluation server",
        folder="benchmarks/MMBench",
        open_points=(
            f"licence: {CARD}",
            "size: of the kit's file not found; images of the 4,329 rows are 103 MB",
            "items: rows, every order of a question being one; the paper used mmbench_dev_20230712.tsv, whose mirror has 4,377",
            "the server matches free text with a language model; here a text that names no option is wrong",
        ),
    ),
    "mmstar": Benchmark(
        title="MMStar", kit_dataset="MMStar", split="val", items=1_500, open_points=(f"licence: {CARD}",),
    ),
    "mmmu": Benchmark(
        title="MMMU", kit_dataset="MMMU_DEV_VAL", split="validation", items=900,
        rule="VLMEvalKit's `can_infer`, no judge; open questions become choices", licence="Apache-2.0",
        open_points=("size: of the kit's file not found; the validation images are 348 MB",),
    ),
    "ai2d": Benchmark(
        title="AI2D", kit_dataset="AI2D_TEST", split="test", items=3_088,
        open_points=(f"licence: {CARD}", "size: of the kit's file not found; images are 538 MB in lmms-lab/ai2d"),
    ),
    "chartqa": Benchmark(
        title="ChartQA", kit_dataset="ChartQA_TEST", split="test", items=2_500, prompt=SHORT, metric="relaxed",
        rule="relaxed accuracy: 5% on numbers", licence="GPL-3.0",
        open_points=("size: of the kit's file not found; images are 107 MB",),
    ),
    "ocrbench": Benchmark(
        title="OCRBench", kit_dataset="OCRBench", split="test", items=1_000, prompt="{question}", metric="ocrbench",
        rule="a reference stands in the answer",
        open_points=(f"licence: {CARD}", "size: of the kit's file not found; images are 86 MB"),
    ),
    "hallusion": Benchmark(
        title="HallusionBench", kit_dataset="HallusionBench", split="image", items=951, prompt="{question}", metric="hallusion",
        rule="mean of accuracy per answer, figure and question", licence="BSD-3-Clause",
        open_points=("size: of the kit's file not found; images are 147 MB",),
    ),
    "seed": Benchmark(
        title="SEED-Bench image", kit_dataset="SEEDBench_IMG", split="image questions", licence="CC BY-NC 4.0",
        folder="benchmarks/SEEDBench",
        open_points=("items: 19k with video by its card; those of images alone were not found", "size: not found"),
    ),
    "realworldqa": Benchmark(
        title="RealWorldQA", kit_dataset="RealWorldQA", split="test", items=765, licence="CC BY-ND 4.0",
        open_points=("size: of the kit's file not found; images are 678 MB",),
    ),
    "mvbench": Benchmark(
        title="MVBench", kit_dataset="MVBench_8frame", folder=None, split="test", prompt="{question}\n{options}",
        rule="the kit reads a letter from the answer", licence="MIT",
        open_points=(
            "video: frames of a video are not shown to students as images yet",
            "items, size, and the kit's prompt were not verified",
        ),
    ),
    "video_mme": Benchmark(
        title="Video-MME", kit_dataset="Video-MME_8frame", folder=None, split="test, no subtitles", items=2_700,
        prompt="{question}\n{options}", rule="the kit reads a letter from the answer",
        open_points=(
            "video: frames of a video are not shown to students as images yet",
            "items: a card shows 2.7k rows; licence, size, and the kit's prompt were not verified",
        ),
    ),
}  # fmt: skip
PAPER = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.in_paper)
