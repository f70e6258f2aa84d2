"""The numbers that make a config tiny: one line of data for each field, and for what an architecture wants besides."""

from collections.abc import Callable, Sequence
from typing import Any

Size = int | Callable[[int], int]


def _hidden(hidden: int) -> int:
    return hidden


def _wide(hidden: int) -> int:
    return hidden * 3 // 2 + 8


FIELDS: dict[str, Size] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim"), _hidden
    ),
    **dict.fromkeys(("encoder_hidden_dim", "hidden_dim", "embedding_dim", "model_dim"), _hidden),
    **dict.fromkeys(("hidden_size_global", "true_hidden_size", "lru_width"), _hidden),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_num_key_value_heads", "kv_n_heads", "num_query_groups", "multi_query_group_num"), 2),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "dff", "dim_ff"), _wide
    ),
    **dict.fromkeys(
        ("ffn_hidden_size", "feed_forward_size", "n_inner", "d_inner", "mlp_dim", "dim_feedforward"), _wide
    ),
    **dict.fromkeys(("intermediate_size_mlp", "decoder_intermediate_size", "encoder_dim_feedforward"), _wide),
    **dict.fromkeys(("encoder_feedforward_dim", "decoder_dim_feedforward", "dense_intermediate_size"), _wide),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_hidden_size"), 40),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 56),
    **dict.fromkeys(("share_expert_dim", "shared_experts_intermediate_size", "shared_intermediate_size"), 56),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "layers"), 3),
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), 3),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "text_vocab_size"), 320),
    **dict.fromkeys(("vocab_size_per_layer_input", "unit_hifi_gan_vocab_size", "t2u_vocab_size"), 320),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 128),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 128),
    **dict.fromkeys(("kv_lora_rank",), 24),
    **dict.fromkeys(("q_lora_rank",), 28),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("qk_nope_head_dim",), 12),
    **dict.fromkeys(("qk_head_dim",), 20),
    **dict.fromkeys(("v_head_dim",), 16),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("index_n_heads",), 4),
    **dict.fromkeys(("index_topk",), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 12),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_ssm",), 128),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 10),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_head_dim"), 12),
    **dict.fromkeys(("linear_value_head_dim",), 20),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size_text", "sliding_window_size"), 6),
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(("d_kv",), 16),
    **dict.fromkeys(("d_head", "attention_head_size", "kv_channels"), 16),
    **dict.fromkeys(("embedding_size", "input_embedding_size"), 24),
    **dict.fromkeys(("output_embedding_size", "projection_dim", "project_dim", "projector_hidden_size"), 40),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("pooler_hidden_size", "pooler_output_size"), 64),
    **dict.fromkeys(("num_conv_pos_embeddings",), 16),
    **dict.fromkeys(("num_conv_pos_embedding_groups",), 4),
    **dict.fromkeys(("num_mel_bins", "input_feat_per_channel"), 16),
    **dict.fromkeys(("max_source_positions",), 20),
    **dict.fromkeys(("conv_depthwise_kernel_size",), 5),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size"), 64),
    **dict.fromkeys(("encoder_hidden_size",), 48),
    **dict.fromkeys(("classifier_proj_size",), 24),
    **dict.fromkeys(("fpn_hidden_size", "fusion_hidden_size", "mask_feature_size", "fpn_feature_size"), 32),
    **dict.fromkeys(("num_queries", "num_query_tokens"), 10),
    **dict.fromkeys(("num_frames",), 4),
    **dict.fromkeys(("num_buckets",), 32),
    **dict.fromkeys(("ngram_vocab_size_base",), 64),
    **dict.fromkeys(("codevector_dim", "proj_codevector_dim"), 16),
    **dict.fromkeys(("d_latents",), 56),
    **dict.fromkeys(("num_latents",), 6),
    **dict.fromkeys(("hidden_size_per_layer_input",), 8),
    **dict.fromkeys(("laurel_rank",), 6),
    **dict.fromkeys(("max_bucket_distance",), 64),
    **dict.fromkeys(("router_hidden_size",), 24),
    **dict.fromkeys(("entity_vocab_size",), 50),
    **dict.fromkeys(("entity_emb_size",), 24),
    **dict.fromkeys(("encoder_hash_byte_group_vocab",), 64),
    **dict.fromkeys(("max_length",), 64),
}
"""Field -> tiny value; a function of the hidden size where the two go together."""


def _few(values: Sequence[Any]) -> list[Any]:
    return [2 if isinstance(v, int) and v > 2 else v for v in values]


def _stages(values: Sequence[Any]) -> list[Any]:
    base = (24, 32, 48, 64, 80, 96, 112, 128)
    distinct = sorted(set(values))
    return [base[distinct.index(v)] for v in values]


LISTS: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
    "depths": _few,
    "hidden_sizes": _stages,
    "embed_dims": _stages,
    "neck_hidden_sizes": _stages,
    "encoder_hidden_sizes": _stages,
    "image_size": lambda values: [32] * len(values),
    "patch_size": lambda values: [8] * len(values),
    "conv_dim": lambda values: [32] * len(values),
    "tdnn_dim": lambda values: [24] * len(values),
}
"""The same for fields that hold a value for each stage."""

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MROPE_HALF = {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_MROPE_TEXT: dict[str, Any] = {"text_config": {"rope_parameters": _MROPE}}
_SWIN: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_PVT: dict[str, Any] = {"num_attention_heads": [1, 2, 4, 4], "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 1, 1]}

EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "convnext": {"hidden_sizes": [16, 24, 32, 40], "depths": [2, 1, 2, 1]},
    "convnextv2": {"hidden_sizes": [16, 24, 32, 40], "depths": [2, 1, 2, 1]},
    "cvt": {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 4], "depth": [1, 1, 2], "num_stages": 3},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "efficientnet": {"image_size": 128, "width_coefficient": 0.25, "depth_coefficient": 0.4, "hidden_dim": 320},
    "emu3": {
        "vocabulary_map": {"<image>": 5},
        "vq_config": {"base_channels": 32, "codebook_size": 64, "channel_multiplier": [1, 2]},
    },
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "focalnet": {
        "embed_dim": 16,
        "hidden_sizes": [16, 32],
        "depths": [2, 2],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 320,
        "intermediate_size": [104] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm46v": {"text_config": {"rope_parameters": _MROPE_HALF}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE_HALF}},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE_HALF}},
    "glm4v_moe_text": {"rope_parameters": _MROPE_HALF},
    "glm4v_text": {"rope_parameters": _MROPE_HALF},
    "glm_image": {"text_config": {"rope_parameters": _MROPE_HALF}},
    "glm_image_text": {"rope_parameters": _MROPE_HALF},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE_HALF}},
    "glm_ocr_text": {"rope_parameters": _MROPE_HALF},
    "glmga": {"text_config": {"rope_parameters": _MROPE_HALF}},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4},
    "hiera": {
        "embed_dim": 16,
        "num_heads": [1, 2],
        "depths": [1, 2],
        "num_query_pool": 1,
        "image_size": [64, 64],
        "masked_unit_attention": [True, False],
    },
    "inkling_text": {
        "num_key_value_heads": 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "llama4": {"vision_config": {"vision_output_dim": 40, "projector_input_dim": 40, "projector_output_dim": 40}},
    "longcat_flash": {"num_key_value_heads": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 24},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilevit": {"image_size": 128},
    "mobilevitv2": {"width_multiplier": 0.25, "base_attn_unit_dims": [64, 96, 128]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": _MROPE_TEXT,
    "paligemma": {"projection_dim": 64, "vision_config": {"projection_dim": 64}},
    "pvt": _PVT,
    "pvt_v2": _PVT,
    "qwen2_5_omni_thinker": _MROPE_TEXT,
    "qwen2_5_vl": _MROPE_TEXT,
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl": _MROPE_TEXT,
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 6},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [24, 40],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local"] * 3,
    },
    "roc_bert": {
        "shape_vocab_size": 40,
        "pronunciation_vocab_size": 40,
        "shape_embed_dim": 24,
        "pronunciation_embed_dim": 28,
    },
    "squeezebert": {"embedding_size": 64},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "swin2sr": {**_SWIN, "image_size": 16},
    "tipsv2": {"vision_config": {"hidden_size": 64}},
    "vjepa2": {
        "pred_hidden_size": 48,
        "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 2,
        "crop_size": 32,
        "frames_per_clip": 4,
    },
    "xclip": {
        "vision_config": {"mit_hidden_size": 40, "mit_num_attention_heads": 4, "mit_intermediate_size": 72},
        "prompt_num_attention_heads": 4,
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}
"""What an architecture wants besides."""

SINGLE = ("fsmt", "xglm", "mra")
"""Architectures whose own code takes float32 alone."""

NAMES = """
audioflamingo3 bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt glmasr granite_speech
granite_speech_plus led longt5 m2m_100 marian mbart moss_transcribe_diarize mt5 musicflamingo mvp nllb-moe pegasus
pegasus_x plbart prophetnet qwen2_audio seamless_m4t seamless_m4t_v2 switch_transformers t5 t5gemma t5gemma2 umt5
voxtral cohere_asr fun_asr_nano moonshine pop2piano speech_to_text speecht5 whisper aria aya_vision blip cosmos3_edge
cosmos3_omni deepseek_vl emu3 evolla exaone4_5 fuyu gemma3 git glm46v glm4v glm4v_moe glm_ocr glmga got_ocr2
granite_docling hyperclovax_vision_v2 internvl kimi_k25 kosmos-2.5 lfm2_vl lfm3_vl lighton_ocr llama4 llava_next
llava_next_video llava_onevision minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral_large4 mllama
muse_glimmer ovis2 pp_chart2table qianfan_ocr qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl
qwen3_vl_moe shieldgemma2 video_llama_3 video_llava vipllava vision-encoder-decoder albert bert big_bird camembert
convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm esmc eurobert flaubert fnet funnel gte ibert
jina_embeddings_v3 layoutlm longformer luke megatron-bert mobilebert modernbert mpnet mra nomic_bert nystromformer
perceiver rembert roberta roberta-prelayernorm roc_bert roformer squeezebert tapas ultrabert xlm xlm-roberta
xlm-roberta-xl xmod yoso afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam bert-generation biogpt
bitnet bloom codegen cohere cohere2 cohere2_moe cpmant ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma
gemma2 gemma3_text gemma3n_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jamba jetmoe
kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash
minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi mpt
nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss smollm3 solar_open
stablelm starcoder2 trocr vaultgemma xglm xlnet xlstm youtu zamba zamba2 zaya beit clip convnext convnextv2
data2vec-vision deit dinov2 dinov2_with_registers donut-swin efficientnet focalnet hiera ijepa imagegpt metaclip_2
mobilenet_v1 mobilenet_v2 mobilevit poolformer pp_lcnet pvt pvt_v2 regnet resnet segformer siglip swiftformer swin
swinv2 vit vit_msn rf_detr yolos data2vec-audio hubert lasr_ctc parakeet_ctc sew sew-d unispeech unispeech-sat
wav2vec2 wavlm audio-spectrogram-transformer timesformer videomae videoprism_vision_model vivit vjepa2 canine markuplm
superpoint aimv2 aimv2_vision_model altclip bros chinese_clip chinese_clip_vision_model clip_text_model
clip_vision_model clipseg cosmos3_edge_text dinov3_convnext dinov3_vit dpr flava glm4v_moe_text glm4v_text glm_image
glm_image_text glm_image_vision glm_ocr_text glmasr_encoder granite_docling_text granite_docling_vision groupvit
higgs_audio_v2 idefics3_vision internvl_vision lasr_encoder maskformer-swin mistral_large4_text mlcd mlcd_vision_model
molmo2_text moss_transcribe_diarize_audio muse_glimmer_text muse_spark_text nemotron3_5_transcribe_asr_audio
nemotron3_diarization_audio nemotron_asr_streaming_encoder openai_privacy_filter owlv2 owlvit parakeet_encoder
patchtsmixer patchtst pixio pixtral pp_ocrv6_small_rec pp_ocrv6_tiny_rec qianfan_ocr_vision qwen2_5_vl_text
qwen2_audio_encoder qwen2_vl_text qwen3_vl_moe_text qwen3_vl_text sam3_lite_text_text_model sam3_vision_model
sam3_vit_model sam_hq_vision_model sam_vision_model siglip_vision_model smolvlm_vision splinter swin2sr timesfm2_5
tipsv2 tipsv2_text_model tipsv2_vision_model visual_bert vit_mae vitdet voxtral_encoder voxtral_realtime_encoder xclip
"""
"""Architectures that have a tiny model that runs."""
