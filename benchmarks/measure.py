"""Timing harness, and the machine's description in every result."""

from __future__ import annotations

import datetime
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from components.process import cores

MIB = 2**20

Work = Callable[[], Any]
Pairs = Mapping[str, tuple[str, str]]  # ratio -> numerator arm, denominator arm


def compare_arms(
    arms: Mapping[str, Work], repeats: int, device: torch.device, title: str, over: Pairs, **amount: float
) -> dict[str, Any]:
    """Result of interleaved arms: medians and quartiles over the rounds of each arm, and of ratios.

    Args:
        over: ratios of seconds; those with a missing arm are left out.
        amount: work of one run of an arm: tokens=1000 gives tokens_per_second.
    """
    seconds = interleaved(arms, repeats, device, title)
    rounds = [ratios(dict(zip(seconds, durations, strict=True)), over) for durations in zip(*seconds.values(), strict=True)]
    values_by_ratio = {name: [values[name] for values in rounds] for name in rounds[0]}
    return {
        "repeats": repeats,
        "ratios": {name: statistics.median(values) for name, values in values_by_ratio.items()},
        "quartiles": {name: quartiles(values) for name, values in values_by_ratio.items()},
        "arms": {
            arm: summary(durations)
            | {f"{unit}_per_second": count / statistics.median(durations) for unit, count in amount.items()}
            for arm, durations in seconds.items()
        },
    }


def ratios(values: Mapping[str, float], over: Pairs) -> dict[str, float]:
    """Quotients of the arms' values; those with a missing arm are left out."""
    return {name: values[a] / values[b] for name, (a, b) in over.items() if a in values and b in values}


def interleaved(arms: Mapping[str, Work], repeats: int, device: torch.device, title: str) -> dict[str, list[float]]:
    """Seconds of each arm, once per round; warm-up is up to the caller.

    Arms take turns within a round and start one further along in the next, so that a machine that slows down slows them all.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=repeats * len(names), desc=title, unit="step") as bar:
        for index in range(repeats):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(stopwatch(arms[name], device))
                bar.update()
    return seconds


def stopwatch(work: Work, device: torch.device) -> float:
    """Seconds of `work` by `clock`."""
    start = clock(device)
    work()
    return clock(device) - start


def clock(device: torch.device) -> float:
    """Wall time after a synchronisation on a GPU; on a CPU this process's CPU time, which other processes do not lengthen.

    The two are the same on an idle machine, for a CPU runs on one thread here (`prepare`).
    """
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def prepare() -> torch.device:
    """Device to measure; a CPU with one thread, as in params/runtime.yaml."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def summary(seconds: list[float]) -> dict[str, Any]:
    return {"seconds": statistics.median(seconds), "seconds_quartiles": quartiles(seconds)}


def quartiles(values: list[float]) -> list[float]:
    quarters = torch.tensor([0.25, 0.75], dtype=torch.double)
    return torch.tensor(values, dtype=torch.double).quantile(quarters).tolist()


def relative_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Relative error: norm of the difference over the norm of `expected`."""
    distance = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(actual, expected, strict=True)) ** 0.5
    return distance / sum(float(b.double().square().sum()) for b in expected) ** 0.5


def children_cpu() -> float:
    """CPU seconds of child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def children_cost(work: Work) -> dict[str, float]:
    """Wall-clock seconds of `work`, and CPU seconds of the processes that it starts and waits for."""
    start, cpu_start = time.perf_counter(), children_cpu()
    work()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": children_cpu() - cpu_start}


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, best of several: the device's practical peak."""
    n, tries = (8192, 8) if device.type == "cuda" else (512, 4)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(stopwatch(lambda: a @ b, device) for _ in range(tries))


def result(benchmark: str, size: str, about: str, device: torch.device) -> dict[str, Any]:
    """Header of every result: what was measured, where and when."""
    import transformers

    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return {
        "benchmark": benchmark,
        "size": size,
        "about": about,
        "machine": f"{cores()} CPU cores, {accelerator}",
        "clock": "wall time" if device.type == "cuda" else f"CPU time of the process, {torch.get_num_threads()} thread",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
