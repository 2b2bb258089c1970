"""The classification of each field of vLLM 0.32's configuration: `test_real_vllm.py` fails if vLLM has another set of fields.

NAMED: part of a page's name. REFUSED: other values than the served ones are refused, by `supported.SERVED` or by their effect on
the specification of the cache. PASSED_BY: requests that use it are computed without the store. NO_EFFECT: no effect on the bytes of
a block, apart from the rounding that vLLM's own prefix cache accepts, or on which process holds them.
"""

from __future__ import annotations

from typing import Final

NAMED: Final = {
    "ModelConfig": (
        "dtype hf_config hf_config_path hf_overrides hf_text_config max_model_len model quantization quantization_config revision"
    ),
    "CacheConfig": "block_size kv_cache_layout prefix_caching_hash_algo sliding_window",
    "ParallelConfig": "tensor_parallel_size",
    "AttentionConfig": "backend backend_per_kind",
    "LoadConfig": "download_dir ignore_patterns",
}
REFUSED: Final = {
    "VllmConfig": "additional_config diffusion_config weight_transfer_config",
    "ModelConfig": "code_revision convert model_class_overrides model_weights pooler_config runner",
    "CacheConfig": (
        "cache_dtype enable_mamba_shared_prefix_checkpoint hash_block_size is_attention_free kv_cache_dtype_skip_layers "
        "mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_page_size_padded mamba_ssm_cache_dtype prefix_match_unit "
        "replayssm_buffer_len skip_page_size_padded swa_bounded_replay use_kda_recoverssm use_replayssm"
    ),
    "ParallelConfig": (
        "_allow_auto_resolve_cp_interleave_size cp_kv_cache_interleave_size dcp_comm_backend dcp_kv_cache_interleave_size "
        "dcp_q_replicate decode_context_parallel_size pipeline_parallel_size prefill_context_parallel_size"
    ),
    "SpeculativeConfig": "method",
    "AttentionConfig": (
        "hisparse_config indexer_kv_dtype indexer_sparse_logits minimax_m3_msa_decode_backend mla_prefill_backend "
        "sparse_mla_force_mqa sparse_mla_prefill_workspace_factor tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph "
        "use_non_causal"
    ),
    "LoadConfig": "load_format",
    "KVTransferConfig": "enable_permute_local_kv kv_load_failure_policy kv_role",
    "SchedulerConfig": "runner_type",
    "AuxOutputConfig": "enable_return_routed_experts",
}
PASSED_BY: Final = {
    "VllmConfig": "lora_config",
    "ModelConfig": "multimodal_config",
}
NO_EFFECT: Final = {
    "VllmConfig": (
        "attention_config aux_output_config cache_config compilation_config device_config ec_manager_config "
        "ec_transfer_config engram_config instance_id kernel_config kv_events_config kv_transfer_config load_config "
        "logging_config mamba_config model_config observability_config offload_config optimization_level parallel_config "
        "performance_mode profiler_config quant_config reasoning_config scheduler_config shutdown_timeout speculative_config "
        "structured_outputs_config watermark_config"
    ),
    "ModelConfig": (
        "allow_deprecated_quantization allowed_local_media_path allowed_media_domains config_format disable_cascade_attn "
        "disable_sliding_window enable_cumem_allocator enable_nccl_comm_suspend enable_prompt_embeds enable_sleep_mode "
        "enable_trace_replay enforce_eager generation_config hf_token io_processor_plugin is_submodel_config "
        "logits_processors logprobs_mode max_logprobs model_impl override_generation_config renderer_num_workers "
        "return_sampling_mask seed served_model_name skip_tokenizer_init sleep_mode_backend sleep_mode_offload_cudagraph "
        "sleep_preserve_parameter_names spec_target_max_model_len tokenizer tokenizer_mode tokenizer_revision "
        "trust_remote_code use_fp64_gumbel word_embeddings_untied_by_checkpoint"
    ),
    "CacheConfig": (
        "_block_size_resolved cache_hit_alignment_tokens effective_attention_block_size enable_prefix_caching "
        "gpu_memory_utilization kv_cache_max_concurrency kv_cache_memory_bytes kv_cache_size_tokens kv_offloading_backend "
        "kv_offloading_size kv_sharing_fast_prefill num_cpu_blocks num_gpu_blocks num_gpu_blocks_override "
        "prefix_cache_retention_interval user_specified_block_size"
    ),
    "ParallelConfig": (
        "_api_process_count _api_process_rank _coord_store_port _data_parallel_master_port_list all2all_backend "
        "assigned_physical_gpu_ids cpu_distributed_timeout_seconds data_parallel_backend data_parallel_external_lb "
        "data_parallel_hybrid_lb data_parallel_index data_parallel_master_ip data_parallel_master_port data_parallel_rank "
        "data_parallel_rank_local data_parallel_rpc_port data_parallel_size data_parallel_size_local "
        "dbo_decode_token_threshold dbo_prefill_token_threshold disable_custom_all_reduce disable_nccl_for_dp_synchronization "
        "distributed_executor_backend distributed_timeout_seconds dp_sync_interval elastic_ep_max_dp_size "
        "enable_batch_sharded_sampling enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb "
        "enable_expert_parallel enable_fault_tolerance enable_hc_sp enable_shm_tensor_arena eplb_config "
        "expert_placement_strategy fault_tolerance_config is_moe_model master_addr master_port max_parallel_loading_workers "
        "nnodes node_rank numa_bind numa_bind_cpus numa_bind_nodes placement_group rank ray_runtime_env "
        "ray_workers_use_nsight ubatch_size worker_cls worker_extension_cls world_size"
    ),
    "SpeculativeConfig": (
        "attention_backend code_revision disable_eagle_block_drop disable_padded_drafter_batch draft_load_config "
        "draft_model_config draft_parallel_config draft_sample_method draft_tensor_parallel_size dspark_draft_topk "
        "enable_adaptive_verification enforce_eager index_share_for_mtp_iteration kv_cache_dtype max_model_len model "
        "moe_backend num_speculative_tokens num_speculative_tokens_per_batch_size parallel_drafting prompt_lookup_max "
        "prompt_lookup_min quantization rejection_sample_method revision suffix_decoding_max_cached_requests "
        "suffix_decoding_max_spec_factor suffix_decoding_max_tree_depth suffix_decoding_min_token_prob "
        "synthetic_acceptance_length synthetic_acceptance_rates target_model_config target_parallel_config "
        "tensor_parallel_size use_heterogeneous_vocab use_local_argmax_reduction"
    ),
    "AttentionConfig": (
        "disable_flashinfer_q_quantization flash_attn_max_num_splits_for_cuda_graph flash_attn_version flex_attn_block_m "
        "flex_attn_block_n flex_attn_kv_block_size flex_attn_q_block_size use_prefill_query_quantization use_trtllm_attention"
    ),
    "LoadConfig": (
        "device model_loader_extra_config pt_load_map_location safetensors_load_strategy "
        "safetensors_prefetch_block_size safetensors_prefetch_num_threads use_tqdm_on_load"
    ),
    "KVTransferConfig": "engine_id kv_buffer_device kv_connector kv_connector_extra_config kv_connector_module_path kv_port",
    "SchedulerConfig": (
        "async_scheduling disable_chunked_mm_input disable_hybrid_kv_cache_manager enable_chunked_prefill encoder_cache_size "
        "is_multimodal_model long_prefill_token_threshold long_prefill_token_threshold_adaptive max_num_active_seqs "
        "max_num_batched_tokens max_num_encoder_input_tokens max_num_queued_reqs max_num_queued_tokens "
        "max_num_scheduled_tokens max_num_seqs policy prefill_schedule_interval scheduler_cls scheduler_reserve_full_isl "
        "stream_interval watermark"
    ),
    "AuxOutputConfig": "max_bytes",
}
