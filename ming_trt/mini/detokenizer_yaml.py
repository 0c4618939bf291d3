"""The detokenizer's configuration file of the small checkpoint: `talker/audio_detokenizer_stream.yaml`."""

from __future__ import annotations

from ming_trt.speech_config import FlowConfig, HiftConfig


def detokenizer_yaml(f: FlowConfig, h: HiftConfig) -> str:
    """The text of the file, with the official keys and tags."""

    def numbers(values: tuple[int, ...]) -> str:
        return f"[{', '.join(map(str, values))}]"

    dilations = f"[{', '.join(numbers(h.dilations) for _ in h.resblock_kernels)}]"
    return f"""sample_rate: {h.sample_rate}
spk_embed_dim: {f.speaker_dim}
token_frame_rate: 50
token_mel_ratio: 1
chunk_size: {f.chunk}
num_decoding_left_chunks: -1
flow: !new:audio_detokenizer.flow.flow.CausalMaskedDiffWithXvec
    input_size: {f.width}
    output_size: {f.mel}
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: {f.vocabulary}
    input_frame_rate: !ref <token_frame_rate>
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: {f.look_ahead}
    encoder: !new:audio_detokenizer.transformer.upsample_encoder_new_mel.UpsampleConformerEncoder
        output_size: {f.width}
        attention_heads: {f.heads}
        linear_units: {f.feed_forward}
        num_blocks: {f.encoder_layers}
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: {f.width}
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: !ref <chunk_size>
    decoder: !new:audio_detokenizer.flow.flow_matching.CausalConditionalCFM
        in_channels: {3 * f.mel}
        n_spks: 1
        spk_emb_dim: {f.mel}
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: {f.guidance}
                reg_loss_type: 'l1'
        estimator: !new:audio_detokenizer.flow.decoder.CausalConditionalDecoder
            in_channels: {4 * f.mel}
            out_channels: {f.mel}
            channels: [{f.channels}]
            dropout: 0.0
            attention_head_dim: {f.estimator_head_dim}
            n_blocks: {f.transformers}
            num_mid_blocks: {f.mid_stages}
            num_heads: {f.estimator_heads}
            act_fn: 'gelu'
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>
hift: !new:audio_detokenizer.hifigan.generator.HiFTGenerator
    in_channels: {h.mel}
    base_channels: {h.base}
    nb_harmonics: {h.harmonics}
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: {numbers(h.up_rates)}
    upsample_kernel_sizes: {numbers(h.up_kernels)}
    istft_params:
        n_fft: {h.n_fft}
        hop_len: {h.istft_hop}
    resblock_kernel_sizes: {numbers(h.resblock_kernels)}
    resblock_dilation_sizes: {dilations}
    source_resblock_kernel_sizes: {numbers(h.source_kernels)}
    source_resblock_dilation_sizes: {dilations}
    lrelu_slope: {h.slope}
    audio_limit: {h.limit}
    f0_predictor: !new:audio_detokenizer.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: {h.mel}
        cond_channels: {h.f0_width}
"""
