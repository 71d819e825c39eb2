"""LoRA through peft: small matrices beside frozen ones, merged into the weights before anyone else sees the model."""

from torch import nn

from ropeway.config.params import WeightParams
from ropeway.models.architectures import is_embedding_or_head
from ropeway.runtime.errors import ConfigError


def add_adapters(model: nn.Module, profile: WeightParams) -> None:
    """Put LoRA layers into a model in place and freeze the rest, when `peft_model` asks for it.

    Drawn from torch's global generator, which the caller has seeded: A is random, B zero, so the model is the base.
    Source: Hu et al. 2021, arXiv:2106.09685.

    Raises:
        ConfigError: A name in `lora.target_modules` is no linear layer of the model.
    """
    if not profile.peft_model or profile.lora is None:
        return
    from peft import LoraConfig, inject_adapter_in_model

    lora = profile.lora
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    if unknown := sorted(set(lora.target_modules) - linear):
        raise ConfigError(
            f"lora.target_modules: {', '.join(unknown)} is no linear layer of this model; there are: "
            f"{', '.join(sorted(linear))}"
        )
    inject_adapter_in_model(
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules),
        model,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or (lora.train_embeddings and is_embedding_or_head(name))


def merge_adapters(model: nn.Module) -> None:
    """Add every LoRA product to its frozen matrix and put the plain layer back: any loader reads the result.

    Raises:
        ConfigError: A merged weight is not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ConfigError(f"{name}: merging its adapter gives weights that are not finite; {error}") from None
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
