"""What models compute on and in which precision, where that is left to kick."""

from kick.errors import ConfigError, first_line


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """float32 on a CPU; on a GPU bfloat16, or float16 where it has no units for that: without surprises."""
    import torch

    if device.partition(":")[0] == "cpu":
        return "float32"
    without = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "float16" if without else "bfloat16"


def choose(device: str, dtype: str) -> tuple[str, str]:
    """(device, dtype) with `auto` decided. Raises ConfigError for a device that cannot be used."""
    device = choose_device(device)
    return device, choose_dtype(dtype, device)


def choose_device(device: str) -> str:
    device = default_device() if device == "auto" else device
    check_device(device)
    return device


def choose_dtype(dtype: str, device: str) -> str:
    return default_dtype(device) if dtype == "auto" else dtype


def is_usable(device: str) -> bool:
    try:
        check_device(device)
    except ConfigError:
        return False
    return True


def check_device(device: str) -> None:
    import torch

    try:
        if torch.empty(1, device=device).device.type not in ("cpu", "cuda"):
            raise RuntimeError("nothing can be computed there.")
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device '{device}' cannot be used: {first_line(error)}", "Expected cpu, cuda or cuda:N."
        ) from error
