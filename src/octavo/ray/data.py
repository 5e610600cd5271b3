"""Operators for Ray Data: a column of prompts or texts in, columns of results added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from ray.data import ActorPoolStrategy

from octavo.ray.data_actors import Embedder, Generator
from octavo.services.client import GenerationOptions

_CALLS_AT_ONCE = 4  # of an actor: while one batch ends, the next ones keep the engine busy


def generate(
    dataset: Any,
    model: str,
    *,
    column: str = "prompt",
    prefix: str = "",
    actors: int | tuple[int, int] = 1,
    batch_size: int = 64,
    resources: Mapping[str, Any] | None = None,
    engine_options: Mapping[str, str | float | bool] | None = None,
    **options: Unpack[GenerationOptions],
) -> Any:
    """Return the dataset with a continuation of each row's prompt, its columns and order kept.

    dataset         a ray.data.Dataset
    model           as for octavo.LLM, which each actor has one of
    column          of prompts: texts, lists of token ids, or lists of messages (`{"role": ..., "content": ...}`)
    prefix          of the names of the new columns: text, finish_reason, prompt_tokens, output_tokens and error, which
                    is null where there is a text. A row that fails ends no other.
    actors          how many models run at once, or the least and the most
    batch_size      rows of a call; an actor has four calls at once, and its engine batches all their rows together
    resources       of an actor, for ray.remote: `{"num_gpus": 1}`
    engine_options  of `octavo serve`, with _ for -
    options         of each generation, as for octavo.LLM.generate

    A process of the engine or an actor that dies costs no row and repeats none.
    """
    made = {"column": column, "prefix": prefix, "options": dict(options)}
    return _mapped(dataset, Generator, model, engine_options, made, actors, batch_size, resources)


def embed(
    dataset: Any,
    model: str,
    *,
    column: str = "text",
    prefix: str = "",
    actors: int | tuple[int, int] = 1,
    batch_size: int = 128,
    resources: Mapping[str, Any] | None = None,
    engine_options: Mapping[str, str | float | bool] | None = None,
    **options: Any,
) -> Any:
    """Return the dataset with a vector for each row's text; arguments are those of `generate`.

    column   of texts, or of lists of token ids
    prefix   of the names of the new columns: embedding, a list of float32, and error
    options  as for octavo.LLM.embed
    """
    made = {"column": column, "prefix": prefix, "options": dict(options)}
    return _mapped(dataset, Embedder, model, engine_options, made, actors, batch_size, resources)


def _mapped(
    dataset: Any,
    actor: type,
    model: str,
    engine_options: Mapping[str, str | float | bool] | None,
    made: Mapping[str, Any],
    actors: int | tuple[int, int],
    batch_size: int,
    resources: Mapping[str, Any] | None,
) -> Any:
    least, most = (actors, actors) if isinstance(actors, int) else actors
    mapped = dataset.map_batches(
        actor,
        fn_constructor_kwargs={"model": model, "engine_options": dict(engine_options or {}), **made},
        batch_size=batch_size,
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ActorPoolStrategy(
            min_size=least,
            max_size=most,
            max_tasks_in_flight_per_actor=2 * _CALLS_AT_ONCE,
            max_concurrent_calls_per_actor=_CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        **dict(resources or {"num_cpus": 1}),
    )
    mapped.context.execution_options.preserve_order = True
    return mapped
