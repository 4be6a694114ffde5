"""The IRS search's pass against a plain teacher pass over the same pairs: `python -m benchmarks.search --size small`

Each pair is one image under two instructions, without answers. Three ways over the same batch: the teacher's plain forward pass
with fused attention; the search, which probes every layer beside that kernel; and eager attention that keeps all maps, the
usual way to get them. Search and maps are compared for equality before anything is timed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, table
from benchmarks.reference import twin
from benchmarks.shapes import SIZES, Size, batch, llava
from components.align_ti.batch import Batch
from components.evaluate.memory import peak_bytes
from components.models.attention import AttentionProbe, attention_layers, probing
from components.models.vlm import VLM

RATIOS = {"search_vs_plain": ("search", "plain"), "eager_vs_plain": ("eager maps", "plain")}


def pairs(size: Size, device: torch.device) -> Batch:
    """Two prompts per image, nothing padded; at least four images."""
    prompts = batch(replace(size, batch=2 * max(4, size.batch // 2), response=0), device)
    assert prompts.pixel_values is not None
    return replace(prompts, pixel_values=prompts.pixel_values[::2].repeat_interleave(2, dim=0))


class Ways:
    """Attention maps of the same pairs, computed in three ways."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.batch = pairs(size, device)
        self.vlm = VLM(llava(size.teacher, size.tower, device, size.compute_dtype, seed=2)).eval().requires_grad_(False)
        self.probed = VLM(twin(self.vlm.model, "sdpa"))
        self.eager_model = twin(self.vlm.model, "eager")
        self.layers = list(attention_layers(self.vlm.model))

    @torch.inference_mode()
    def plain(self) -> Tensor:
        return self.vlm.plain(self.batch, self.vlm.features(self.batch), keep=False)[0]

    @torch.inference_mode()
    def search(self) -> Tensor:
        """Attention (L, B, Nv), computed as in `components.irs.search.attention_maps`."""
        with probing(
            self.probed.model, self.layers, AttentionProbe.from_masks(self.batch.instruction, self.batch.pictures)
        ) as probe:
            self.probed.plain(self.batch, self.probed.features(self.batch), keep=False)
        return torch.stack([probe.maps[layer] for layer in self.layers])

    @torch.inference_mode()
    def eager(self) -> Tensor:
        """Attention (L, B, Nv) from all layers' (B, H, T, T) maps."""
        b = self.batch
        pixels = None if b.pixel_values is None else b.pixel_values.to(self.eager_model.dtype)
        out = self.eager_model.model(input_ids=b.input_ids, pixel_values=pixels, output_attentions=True, use_cache=False)
        rows, columns = b.instruction[0], b.visual[0]  # at the same positions in every prompt
        return torch.stack([maps.float().mean(1)[:, rows][:, :, columns].mean(1) for maps in out.attentions])


def run(size: Size, device: torch.device, repeats: int | None = None) -> dict[str, Any]:
    ways = Ways(size, device)
    search_maps, eager_maps = ways.search(), ways.eager()
    difference = float((search_maps - eager_maps).abs().max() / eager_maps.abs().max())
    tolerance = 2e-2 if size.bf16 else 1e-4
    assert difference <= tolerance, f"the search and the eager maps differ by {difference:.1e}, at most {tolerance}"
    arms = {"plain": ways.plain, "search": ways.search, "eager maps": ways.eager}
    weights = measure.bytes_of(ways.vlm.parameters())
    peaks = {name: weights + peak_bytes(work, device) for name, work in arms.items()}
    prompts = len(ways.batch.input_ids)
    timing = measure.compare_arms(arms, repeats or size.repeats, device, f"search {size.name}", RATIOS, pairs=prompts / 2)
    timing["ratios"] |= {f"memory_{name}": ratio for name, ratio in measure.ratios(peaks, RATIOS).items()}
    for name, arm in timing["arms"].items():
        arm["peak_mib"] = peaks[name] / measure.MIB
    about = f"teacher of {size.about}; {prompts // 2} pairs of {size.prompt} tokens, {len(ways.layers)} layers watched"
    return {
        **measure.result("search", size.name, about, device),
        "precision": size.precision,
        **timing,
        "difference_from_eager": difference,
    }


def main() -> None:
    parser = table.arguments("search", __doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    args = parser.parse_args()
    print(table.report(run(SIZES[args.size], measure.prepare()), args.json))


if __name__ == "__main__":
    main()
