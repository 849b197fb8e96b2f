"""What a run needs: the accelerator, data, network, optimiser; everything is checked before anything is written."""

import ctypes
import platform
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers import UNet2DModel
from discrete import DiscreteObjective
from guard import check_processes
from pictures import Feed, Frame, Pictures, Share, find_frame, held_out, in_memory, open_pictures, open_stream

from ddim_plugin import DiscreteDDIMScheduler, GeneralizedDDIMPipeline, GeneralizedDDIMScheduler
from ddim_plugin.pipelines.loop import SELF_CONDITIONING
from ddim_plugin.process.paths import FlowMatching, VarianceExploding

from .config import TrainConfig, check, scheduler_class
from .objective import OF_PROCESS, ImportanceTimes, Objective
from .output import check_output, check_space
from .run import Run, make_average, read_network


def build_run(config: TrainConfig) -> Run:
    """Check everything and build a run. Raises ValueError or OSError before anything is written."""
    accelerator = make_accelerator(config)
    check(config, accelerator.num_processes)
    check_output(config)
    parts, processes = config.gradient_accumulation_steps, accelerator.num_processes
    share = Share(config.batch_size // processes // parts, parts, accelerator.process_index, processes)
    scheduler = scheduler_class(config.scheduler)(**config.scheduler)
    shift = time_shift(config, scheduler)
    objective = make_objective(config, scheduler, accelerator.device)
    columns = {"label_column": config.label_column, "labelled": config.class_conditional, **config.reading}
    with accelerator.main_process_first():  # one process reads the Hub, the others its cache
        pictures = (open_stream if config.streaming else open_pictures)(config.data, config.split, **columns)
        frame = find_frame(pictures, config.channels, wanted_size(config), config.resize, config.crop)
        fits = isinstance(pictures, Pictures) and memory_needed(pictures, frame) <= config.memory_gb * 1e9
        if not fits and wanted_size(config) is None:
            raise ValueError(f"{config.data} is not held in memory (see --memory_gb): pass --resolution")
    classes = pictures.classes if config.class_conditional else ()

    set_seed(config.seed)  # the same weights on every process
    path = getattr(scheduler, "path", None)
    exploding = isinstance(path, VarianceExploding) and path.sigma_data is None
    unet = make_unet(config, frame, outputs(scheduler), len(classes), exploding)
    if config.init_from is not None:
        with accelerator.main_process_first():
            take_weights(unet, config.init_from)
    check_space(config, unet.num_parameters())
    type(scheduler).from_config(scheduler.config).set_timesteps(min(config.preview_steps, objective.T))
    eval_set = None
    if config.eval_every:
        split = config.eval_split or ("test" if config.eval_data is None else "train")
        columns |= {"data_config": None} if config.eval_data else {}
        others = open_pictures(config.eval_data or config.data, split, **columns)
        eval_set = held_out(others, frame, config.eval_images, classes)
    images = None
    if fits:
        quiet = not accelerator.is_main_process
        images = in_memory(pictures, frame, wanted_size(config) is not None, config.workers, quiet)
    feed = Feed(pictures, frame, share, config.seed, config.flip, config.workers, accelerator.device, images)

    unet.to(accelerator.device)
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.compile:
        unet.compile()
    shapes = [weight.shape for weight in unet.parameters()]
    optimizer = make_optimizer(config, unet, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it asks the data loader, and there is none
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share.size
    network, optimizer = accelerator.prepare(unet, optimizer)
    if [weight.shape for weight in network.parameters()] != shapes:
        raise ValueError("the weights are in shards of unknown shapes: use FSDP 2, or ZeRO 1 or 2")
    network.train()
    set_seed(config.seed + 1 + share.rank)  # dropout differs between processes
    return Run(
        config=config,
        accelerator=accelerator,
        feed=feed,
        share=share,
        scheduler=scheduler,
        objective=objective,
        unet=accelerator.unwrap_model(network),
        network=network,
        optimizer=optimizer,
        average=make_average(network, config.ema_decay, config.ema_warmup),
        importance=ImportanceTimes(objective.T) if config.times == "importance" else None,
        classes=classes,
        eval_set=eval_set,
        dtype=next(network.parameters()).dtype,
        shift=shift,
    )


def make_objective(
    config: TrainConfig, scheduler: GeneralizedDDIMScheduler | DiscreteDDIMScheduler, device: torch.device
) -> Objective | DiscreteObjective:
    """Build the objective of a scheduler. Raises ValueError for a loss that it does not have."""
    if isinstance(scheduler, DiscreteDDIMScheduler):
        return DiscreteObjective(scheduler, config.loss, config.loss_eta, device)
    return Objective(
        scheduler.path,
        scheduler.config.prediction_type,
        config.loss,
        scheduler.config.variance_type,
        config.loss_eta,
        config.snr_gamma,
        config.bound_weight,
        device,
    )


def outputs(scheduler: GeneralizedDDIMScheduler | DiscreteDDIMScheduler) -> int:
    """Return the number of the network's outputs for each value of a picture."""
    if isinstance(scheduler, DiscreteDDIMScheduler):
        return scheduler.config.num_classes
    return 2 if scheduler.config.variance_type == "learned_range" else 1


def time_shift(config: TrainConfig, scheduler: GeneralizedDDIMScheduler | DiscreteDDIMScheduler) -> float:
    """Return the shift of the drawn times, 1 for none. Raises ValueError if it, or the times, contradict the loss."""
    flow, shift = isinstance(getattr(scheduler, "path", None), FlowMatching), 1.0
    if flow:
        if scheduler.config.use_dynamic_shifting:
            raise ValueError("use_dynamic_shifting depends on the size of a picture, and training has one: use shift")
        shift = float(max(scheduler.config.shift, scheduler.config.flow_shift))
    if config.times == "logit_normal" and not flow:
        raise ValueError('times "logit_normal" are those of flow matching: use antithetic, uniform or importance')
    if config.times == "log_normal" and not isinstance(getattr(scheduler, "path", None), VarianceExploding):
        raise ValueError('times "log_normal" are those of variance exploding: use antithetic, uniform or importance')
    if config.times == "importance" and shift != 1:
        raise ValueError(f"times 'importance' are drawn by the loss, so shift={shift:g} has no effect: leave it out")
    if config.loss in OF_PROCESS and (config.times in ("logit_normal", "log_normal") or shift != 1):
        raise ValueError(f"loss {config.loss!r} needs times without preference: use times 'uniform' and shift 1")
    return shift


# ---- the machine ---------------------------------------------------------------------------------------------------


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Start Accelerate. Raises ValueError for a precision that the device does not have, and for unknown trackers."""
    output = Path(config.output).resolve()
    if config.mixed_precision not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"unknown mixed_precision {config.mixed_precision!r}: use no, fp16 or bf16")
    trackers = check_trackers(config.trackers)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "trackers")),
        )
    except ValueError as error:
        raise ValueError(f"{error} Use mixed_precision bf16 or no") from error
    check_processes(accelerator.num_processes)
    device = accelerator.device
    if accelerator.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs an accelerator, and the device is the CPU: use bf16 or no")
    if device.type == "cpu":
        keep_memory()
    without_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator.mixed_precision == "bf16" and without_bf16:
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bf16: use mixed_precision fp16 or no")
    return accelerator


def check_trackers(trackers: tuple[str, ...]) -> list[str]:
    """Return the names of trackers, without "none". Raises ValueError for one that is unknown or not installed."""
    names = [name for name in trackers if name != "none"]
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown tracker {name!r}: use {', '.join(known)}, or none")
        if name not in available:
            raise ValueError(f"the tracker {name!r} is not installed: pip install {name}, or pass --trackers none")
    return names


def keep_memory() -> None:
    """Let the process keep the memory that it frees, if its C library is glibc.

    A step on the CPU frees and allocates the same large tensors again. By default each of them returns to the system
    and comes back page by page, which takes 3 to 10 % of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# ---- the network and its pictures ----------------------------------------------------------------------------------


def make_unet(config: TrainConfig, frame: Frame, outputs: int, classes: int, exploding: bool = False) -> UNet2DModel:
    """Build the network of [unet] for pictures of a frame, with random weights.

    Args:
        outputs: number of its outputs for each value: 2 with a learned variance, K for categorical data, else 1.
        classes: number of classes, or 0. With label_dropout one more embedding means "no class".
        exploding: whether its timestep is σ of the variance-exploding path.

    Raises:
        ValueError: if [unet] contradicts the pictures, or cannot halve them.
    """
    embeds = classes + (config.label_dropout > 0) if classes else None
    size = frame.size[0] if frame.size[0] == frame.size[1] else frame.size
    needed = {"sample_size": size, "in_channels": frame.channels, "out_channels": frame.channels * outputs}
    if config.self_conditioning:  # x_t, and x̂0 beside it
        needed |= {"in_channels": 2 * frame.channels, SELF_CONDITIONING: True}
    needed |= {"num_class_embeds": embeds} if embeds else {}
    unet = UNet2DModel(**needed | {key: None if value == "none" else value for key, value in config.unet.items()})
    if unet.config.time_embedding_type == "fourier" and not exploding:
        raise ValueError(
            "time_embedding_type='fourier' divides the output by the timestep, which must be σ: set sigma_min and "
            "sigma_max, and no sigma_data, in [scheduler], or use 'positional'"
        )
    check_fit(unet, frame.size, frame.channels, outputs, embeds)
    return unet


def take_weights(unet: UNet2DModel, name: str) -> None:
    """Copy the averaged weights of a saved pipeline or of a checkpoint. Raises ValueError if the network is another."""
    folder = Path(name)
    if (folder / "run.json").is_file():
        weights = read_network(folder)[1]
    else:
        weights = GeneralizedDDIMPipeline.from_pretrained(name).unet.state_dict()
    own = unet.state_dict()
    wrong = [f"{key} is missing" for key in own.keys() - weights.keys()]
    wrong += [f"{key} is unknown" for key in weights.keys() - own.keys()]
    wrong += [
        f"{key} is {tuple(weights[key].shape)}, needed {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(
            f"the weights of {name} do not fit this network, {len(wrong)} of {len(own)} (such as {min(wrong)}): give "
            "[unet] the settings of that network, and channels and classes as it has"
        )
    unet.load_state_dict(weights)


def check_fit(unet: UNet2DModel, size: tuple[int, int], channels: int, outputs: int, embeds: int | None) -> None:
    """Raise ValueError if the network does not take pictures of (H, W) = `size` and these labels."""
    config = unet.config
    square = isinstance(config.sample_size, int)
    sample = config.sample_size if square else tuple(config.sample_size)
    made, seen = (config.in_channels, config.out_channels, sample), channels * (1 + (SELF_CONDITIONING in config))
    needed = (seen, channels * outputs, size[0] if square and size[0] == size[1] else size)
    if made != needed:
        raise ValueError(
            f"[unet] has in_channels, out_channels, sample_size {made}; the images"
            f"{f' with {outputs} outputs for each value' if outputs > 1 else ''} need {needed}"
        )
    halvings = len(config.down_block_types) - 1
    if size[0] % 2**halvings or size[1] % 2**halvings:
        raise ValueError(
            f"pictures of {size[0]}×{size[1]} cannot be halved {halvings} times, as a U-Net of {halvings + 1} levels "
            f"does: take a resolution that is a multiple of {2**halvings}, or fewer blocks in [unet]"
        )
    if config.num_class_embeds != embeds:
        raise ValueError(f"[unet] has num_class_embeds = {config.num_class_embeds}; this training needs {embeds}")


def wanted_size(config: TrainConfig) -> tuple[int, int] | None:
    """Return (H, W) if the settings have it, in `resolution` or in [unet] sample_size."""
    size = config.resolution or config.unet.get("sample_size")
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise ValueError(f"sample_size in [unet] must be a side, or [height, width], not {size!r}")
    return (size[0], size[1])


def memory_needed(pictures: Pictures, frame: Frame) -> int:
    """Estimate the bytes of the whole set from its first picture."""
    return pictures.count * frame.canvas(pictures.first(), f"image 0 of {pictures.name}").size


def make_optimizer(config: TrainConfig, unet: UNet2DModel, accelerator: Accelerator) -> torch.optim.Optimizer:
    """Build Adam or AdamW, fused if the device allows it."""
    fused = accelerator.device.type in ("cpu", "cuda", "mps", "xpu")
    fused &= accelerator.mixed_precision != "fp16"  # there Accelerate would not see that the scaler skipped a step
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=fused,
    )
