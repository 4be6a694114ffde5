"""The distill stage under FSDP2 on CPU processes: accelerate 1.15 makes DDP of that, unless it takes gloo for an accelerator's.

Everything after the choice is the real thing: torch's fully_shard over a gloo mesh, accelerate's prepare, save and load.
"""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import DistributedType

from components.distill.__main__ import main
from components.process import exit_from

if __name__ == "__main__":
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    exit_from(main)
