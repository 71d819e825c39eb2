"""LoRA adapters through peft: added before training, merged into the weights before export."""

from torch import nn
from transformers import PreTrainedModel

from ropeway.config.params import WeightParams
from ropeway.runtime.errors import ConfigError


def add_adapters(model: PreTrainedModel, profile: WeightParams) -> None:
    """Add LoRA layers to a model in place and freeze the other weights, if `peft_model` is true.

    A is drawn from torch's global generator, which the caller seeds; B is zero, so the model equals the base at first.
    Source: Hu et al. 2021, arXiv:2106.09685.

    Raises:
        ConfigError: A name in `lora.target_modules` is not a linear layer of the model.
    """
    if not profile.peft_model or profile.lora is None:
        return
    from peft import LoraConfig, inject_adapter_in_model

    lora = profile.lora
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    if unknown := sorted(set(lora.target_modules) - linear):
        raise ConfigError(
            f"lora.target_modules: {', '.join(unknown)} is not a linear layer of this model; its linear "
            f"layers are {', '.join(sorted(linear))}"
        )
    inject_adapter_in_model(
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules),
        model,
    )
    tables = (model.get_input_embeddings(), model.get_output_embeddings()) if lora.train_embeddings else ()
    trained = {id(parameter) for table in tables for parameter in table.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or id(parameter) in trained


def merge_adapters(model: nn.Module) -> None:
    """Merge every LoRA adapter into its weight and restore the plain layers, so that any loader can read the model.

    Raises:
        ConfigError: A merged weight is not finite.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ConfigError(
                f"{name}: merging the LoRA adapter gives non-finite weights ({error}); check the loss or "
                "lower learning_rate"
            ) from None
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
