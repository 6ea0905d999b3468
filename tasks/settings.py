"""Where a run takes place: addresses, places and pool sizes, from the environment only.

What decides the result of a run is in `ursa.config`. Every variable is listed in
`infra/.env.example`.
"""

import os
from typing import Literal, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ursa import storage
from ursa.errors import ConfigError
from ursa.model.size import Recomputed
from ursa.texts import secret_of_address, without_user
from ursa.training.execution import Execution, Strategy


class RuntimeSettings(BaseSettings):
    """The settings of one process; read once where work begins and passed on."""

    model_config = SettingsConfigDict(env_prefix="URSA_", frozen=True, extra="ignore")

    data_uri: str = Field(
        default=".ursa/data", description="everything that a run makes lies below it"
    )
    mlflow_tracking_uri: str = Field(
        default="http://127.0.0.1:5000", description="address of the tracking server"
    )
    ray_address: str | None = Field(
        default=None, description="address of a Ray cluster; None starts one on this machine"
    )
    launcher: Literal["ray", "local"] = Field(
        default="ray", description="local: plain processes on this machine, no Ray"
    )
    num_workers: int = Field(
        default=max(1, os.cpu_count() or 1), ge=1, description="actors that ingest or tokenize"
    )
    decoders_per_worker: int = Field(
        default=1, ge=1, description="processes that decode for an actor that tokenizes"
    )
    gpus_per_worker: float = Field(
        default=0.0, ge=0, description="GPUs of an actor that tokenizes; a part of one is possible"
    )
    num_train_workers: int = Field(default=1, ge=1, description="training processes")
    cpus_per_train_worker: int = Field(
        default=0, ge=0, description="cores of a training process; 0 shares out this machine's"
    )
    gpus_per_train_worker: int = Field(
        default=0, ge=0, le=1, description="1: each training process has a GPU of its own"
    )
    train_strategy: Strategy = Field(
        default="replicated",
        description="fsdp: each training process holds a part of weights, optimizer and average",
    )
    activation_checkpointing: Recomputed = Field(
        default="none", description="what the backward pass of training computes again"
    )
    evaluation_device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the flow's process evaluates; auto: on its GPU, if any"
    )
    compile_layers: bool = Field(
        default=False, description="whether training compiles the layers of the network"
    )

    @field_validator("data_uri")
    @classmethod
    def _absolute(cls, value: str) -> str:
        return storage.absolute_uri(value)

    @field_validator("data_uri", "mlflow_tracking_uri")
    @classmethod
    def _without_secrets(cls, value: str) -> str:
        # it is kept in records and shown on pages
        if found := secret_of_address(value):
            raise ValueError(
                f"the address holds {found}; give it without, secrets have variables of their own "
                "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, AWS_...)"
            )
        return value

    @field_validator("ray_address", mode="before")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or os.environ.get("RAY_ADDRESS") or None

    @classmethod
    def from_env(cls) -> Self:
        """Read the environment.

        Returns:
            The settings.

        Raises:
            ConfigError: If a variable has a value that is not allowed; names the variable.
        """
        try:
            settings = cls()
        except ValidationError as error:
            problems = "; ".join(
                f"URSA_{str(item['loc'][0]).upper()}: {item['msg']} "
                f"(got {without_user(repr(item['input']))})"
                for item in error.errors()
            )
            raise ConfigError(f"environment refused: {problems}") from error
        if settings.ray_address is None and os.environ.get("RAY_ADDRESS"):
            return settings.model_copy(update={"ray_address": os.environ["RAY_ADDRESS"]})
        return settings

    @property
    def execution(self) -> Execution:
        """How training is computed."""
        return Execution(
            strategy=self.train_strategy,
            activation_checkpointing=self.activation_checkpointing,
            compile_layers=self.compile_layers,
            device="cuda" if self.gpus_per_train_worker else "cpu",
        )

    def uri(self, *parts: str) -> str:
        """Return a place below `data_uri`.

        Args:
            *parts: Path segments.
        """
        return storage.join(self.data_uri, *parts)
