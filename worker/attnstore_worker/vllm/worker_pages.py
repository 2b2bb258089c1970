"""The pages of a worker process: from vLLM's configuration and caches to groups, namespaces, blocks and the store.

Owns: the assembly. Written against vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnstore.core.hashing import Namespace
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.vllm.group_pages import GroupStore
from attnstore_worker.vllm.identity import Shard, block_order, group_settings, kv_settings, vllm_namespace
from attnstore_worker.vllm.kv_pages import LayerCache, kv_blocks
from attnstore_worker.vllm.page_groups import PageGroup, layer_specs, page_groups, told_group
from attnstore_worker.vllm.settings import Settings
from attnstore_worker.vllm.shards import HeadRange, ToldSources, sources

MakeTier = Callable[[PageGroup, Namespace, bool], RemoteTier]
"""The store's tier of a group's namespace, and whether events tell of its pages."""


def worker_pages(
    vllm_config: Any,
    kv_cache_config: Any,
    shard: Shard,
    settings: Settings,
    kv_caches: Mapping[str, LayerCache],
    tier: MakeTier,
    *,
    loaded_since_s: float,
) -> tuple[ToldSources, list[list[list[GroupStore]]]]:
    """Returns what the scheduler is told of a rank's sources of pages, and the stores of each source, group and shard.
    `loaded_since_s` as in `weights_name`.
    """
    groups = page_groups(kv_cache_config, shard)
    common = kv_settings(vllm_config, kv_cache_config, model_id=settings.model_id, loaded_since_s=loaded_since_s)
    named = [
        {
            **common,
            **group_settings(layer_specs(kv_cache_config.kv_cache_groups[group.index]), len(groups), shard.count),
            "order": _order(vllm_config, group.layer_names),
        }
        for group in groups
    ]
    step_tokens = int(vllm_config.scheduler_config.max_num_batched_tokens)
    told_index = told.index if (told := told_group(groups)) is not None else None
    all_told, all_stores = [], []
    for number, source in enumerate(sources(groups, shard, settings.tensor_parallel_sizes)):
        spaces = [
            [
                (group, vllm_namespace(group.layout, own, tenant_salt=settings.tenant_salt))
                for group, own in zip(part.groups, named, strict=True)
            ]
            for part in source.ranges
        ]
        all_told.append(tuple(map(tuple, spaces)))
        all_stores.append(
            [
                [
                    _store(
                        kv_caches,
                        kv_cache_config.num_blocks,
                        own,
                        part,
                        *of_part[own.index],
                        tier=tier,
                        tells=number == 0 and own.index == told_index,
                        step_tokens=step_tokens if number == 0 else 1,
                    )
                    for part, of_part in zip(source.ranges, spaces, strict=True)
                ]
                for own in groups
            ]
        )
    return tuple(all_told), all_stores


def _store(
    kv_caches: Mapping[str, LayerCache],
    blocks: int,
    own: PageGroup,
    part: HeadRange,
    group: PageGroup,
    space: Namespace,
    *,
    tier: MakeTier,
    tells: bool,
    step_tokens: int,
) -> GroupStore:
    """The pages of a `group` of some shard, and the part of the rank's `own` blocks that they fill."""
    return GroupStore(
        tier(group, space, tells),
        kv_blocks(
            [kv_caches[name] for name in own.layer_names],
            blocks=blocks,
            layer_bytes=own.layer_bytes,
            head_part=part.block_part,
            head_parts=part.block_parts,
        ),
        group.block_layout if part.page_parts == 1 else own.block_layout,
        group.layout,
        group.page_blocks,
        step_pages=-(-step_tokens // group.page_tokens),
        page_part=part.page_part,
        page_parts=part.page_parts,
    )


def _order(vllm_config: Any, layer_names: Sequence[str]) -> str:
    from vllm import envs
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform

    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
    platform = f"rocm_shuffle={envs.VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT} fnuz={current_platform.is_fp8_fnuz()}"
    return block_order({name: layers[name] for name in layer_names}, platform)
