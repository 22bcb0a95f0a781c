"""Settings of projection heads.

[C] code of Caron et al. 2021 (arXiv:2104.14294), its command-line defaults.
"""

from collections.abc import Mapping

from pydantic import Field, model_validator

from dinoscale.config.sections.fields import Count, Section


class HeadConfig(Section):
    """The projection head: an MLP, an L2 norm and prototypes."""

    num_prototypes: Count = Field(default=65536, description="K, outputs of the head. Source: [C].")
    hidden_dim: Count = Field(default=2048, description="Width of the hidden layers. Source: [C].")
    bottleneck_dim: Count = Field(
        default=256, description="Width before the prototypes. Source: [C]."
    )
    num_layers: Count = Field(default=3, description="Linear layers of the MLP. Source: [C].")
    norm_last_layer: bool = Field(
        default=True,
        description="Keep the length of each prototype at 1 (logits in [-1, 1]). Source: [C].",
    )
    weight_norm: bool = Field(
        default=True,
        description="Weight-normalised prototypes. Source: [C]. false: a plain linear layer, as in "
        "DINOv3, which starts with std 0.02 and has no norm_last_layer.",
    )
    batch_norm: bool = Field(
        default=False,
        description="Batch norm after each hidden layer, over a micro-batch of all ranks. [C].",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_norm_without_weight_norm(cls, values: object) -> object:
        if not isinstance(values, Mapping) or values.get("weight_norm") is not False:
            return values
        return {"norm_last_layer": False, **values}

    @model_validator(mode="after")
    def _length_is_of_weight_norm(self) -> "HeadConfig":
        if self.norm_last_layer and not self.weight_norm:
            raise ValueError(
                "norm_last_layer: plain prototypes (weight_norm=false) have no length of their "
                "own, need false, got true"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_has_a_layer(self) -> "HeadConfig":
        if self.batch_norm and self.num_layers == 1:
            raise ValueError("batch_norm: needs a hidden layer, so head.num_layers >= 2, got 1")
        return self
