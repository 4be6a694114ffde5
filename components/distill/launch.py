"""Launcher of multi-process training: starts `accelerate launch`, forwards signals and exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType

from components.align_ti.step import AlignTI
from components.config.distill import DistillSettings
from components.config.runtime import RuntimeSettings
from components.errors import InputError, Interrupted

CONFIGS = Path("params/accelerate")
LAUNCHED = "ALIGNTI_LAUNCHED"  # environment variable of launched processes
SAVING_SECONDS = 600  # grace period for a checkpoint after SIGTERM


def needs_launch(runtime: RuntimeSettings) -> bool:
    """True in the parent process of a multi-process run, which has to launch the ranks.

    Raises InputError for WORLD_SIZE without RANK in the environment: this process would wait for ranks that do not exist.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" not in os.environ:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, and RANK is not there: it is another job's; unset it"
            " (`devices` in params/runtime.yaml starts several processes)"
        )
    multi_process = runtime.devices > 1 or runtime.accelerate is not None
    return multi_process and "WORLD_SIZE" not in os.environ and LAUNCHED not in os.environ


def launch(runtime: RuntimeSettings, device: str, arguments: list[str], module: str = "components.distill") -> None:
    """Run `python -m MODULE ARGUMENTS` in `runtime.devices` processes, and wait for all of them.

    Args:
        device: "cpu" or "cuda", selects the configuration if `runtime.accelerate` is null.

    Raises:
        InputError: the configuration does not exist, or needs DeepSpeed, which is not installed.
        Interrupted: a signal arrived; it was forwarded, and the processes had time for a checkpoint.
        SystemExit: a process failed; exit code of the first failure.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    config = configuration(runtime, device)
    options = {
        "--config_file": str(config),
        "--num_processes": str(runtime.devices),
        "--num_machines": "1",
        "--machine_rank": "0",
        "--main_process_port": "0",  # any free port
        "--num_cpu_threads_per_process": str(runtime.threads),
    }
    option_words = [word for option in options.items() for word in option]
    os.environ |= {
        LAUNCHED: "1",
        "ALIGNTI_DEVICES": str(runtime.devices),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS),
    }
    try:
        launch_command(launch_command_parser().parse_args([*option_words, "-m", module, *arguments]))
    except (SignalException, UnboundLocalError) as error:
        # A signal during the start of elastic's timer surfaces as UnboundLocalError, with the signal as its context.
        signal = error if isinstance(error, SignalException) else error.__context__
        if not isinstance(signal, SignalException):
            raise
        raise Interrupted(
            f"{runtime.devices} processes stopped by {signal.sigval.name}; run the same command to go on"
        ) from None
    except ImportError as error:
        raise InputError(f"{config}: {error}") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} failed first, with exit code {failure.exitcode}; its message is above", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


def configuration(runtime: RuntimeSettings, device: str) -> Path:
    """Path of the accelerate configuration. Raises InputError if params/accelerate/ has none of that name."""
    name = runtime.accelerate or ("ddp-cpu" if device == "cpu" else "ddp")
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        available = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise InputError(f"params/runtime.yaml: accelerate: {name!r} is none of {CONFIGS}/: {available}")
    return path


def check_world(accelerator: Accelerator, runtime: RuntimeSettings) -> None:
    """Check the world size and the distributed type. Raises InputError if either differs from the configuration.

    accelerate reports neither: `accelerate launch --cpu --num_processes 2` starts one process, and FSDP on a CPU becomes DDP.
    """
    expected = max(runtime.devices, int(os.environ.get("WORLD_SIZE", "1")))
    if accelerator.num_processes != expected:
        raise InputError(
            f"{expected} processes were asked for, and {accelerator.num_processes} came up: look at `distributed_type` of the"
            f" accelerate configuration (params/accelerate/ has some that work), and at `device` in params/runtime.yaml"
        )
    for variable, kind in (
        ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
    ):
        if os.environ.get(variable, "false").lower() == "true" and accelerator.distributed_type != kind:
            raise InputError(
                f"{kind.value} was asked for, and {accelerator.distributed_type.value} came up on {accelerator.device.type}:"
                " accelerate shards on accelerators alone; on a CPU use `accelerate: ddp-cpu` in params/runtime.yaml"
            )


def prepare_sharding(accelerator: Accelerator, module: AlignTI, settings: DistillSettings) -> None:
    """Configure FSDP2's wrapped layer class, or DeepSpeed's micro-batch size and gradient clipping; no-op otherwise."""
    if accelerator.distributed_type == DistributedType.FSDP:
        layers = module.student.model.get_decoder().layers
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [type(layers[0]).__name__]
        # bf16 comes from the loop's autocast; FSDP2's own policy would return the sums of the terms in bf16.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.micro_batch_size,
            "gradient_clipping": settings.optimiser.max_grad_norm,
            "zero_allow_untested_optimizer": True,
        }
