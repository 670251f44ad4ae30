"""Tiny random pipelines of the real diffusers and transformers classes, built offline; `save_pretrained` works on each.

Every maker seeds torch itself, so that two calls give the same weights, and leaves the global generator as it was.
"""

import string

import torch

SIDE = 8
"""Latents (or pixels) are SIDE × SIDE unless said otherwise."""


def _networks(build, seed):
    """Build with weights drawn from `seed`, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build()
        for parameter in net.parameters():
            if float(parameter.detach().abs().max()) == 0:  # zero-initialized gates would hide what passes through them
                torch.nn.init.normal_(parameter, std=0.05)
    return net.eval().requires_grad_(False)


def _unet2d(**options):
    from diffusers import UNet2DModel

    settings = {
        "sample_size": SIDE,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 24),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return _networks(lambda: UNet2DModel(**settings | options), seed=1)


def _unet_condition(**options):
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 24),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return _networks(lambda: UNet2DConditionModel(**settings | options), seed=2)


def _vae(channels=4, **options):
    from diffusers import AutoencoderKL

    return _networks(
        lambda: AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=2 * SIDE,
            **options,
        ),
        seed=3,
    )


def _clip_tokenizer():
    """A tokenizer that spells words letter by letter."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + ",."
    names = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)


def _clip(pooled=False, seed=4):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = CLIPTextModelWithProjection if pooled else CLIPTextModel
    return tokenizer, _networks(lambda: kind(config), seed)


def _t5(width=32):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = string.ascii_lowercase + string.digits + ",."
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
    )
    return tokenizer, _networks(lambda: T5EncoderModel(config), seed=6)


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _scheduler(kind, options, **defaults):
    import diffusers

    return getattr(diffusers, kind)(**defaults | options)


def make_ddpm(scheduler="DDPMScheduler", unet=None, **options):
    """Unconditional pixels, 3 × 8 × 8; `options` go to the scheduler, `unet` holds options of the network."""
    from diffusers import DDPMPipeline

    defaults = {"clip_sample": False} if scheduler.startswith("DDPM") else {}
    return _quiet(DDPMPipeline(_unet2d(**unet or {}), _scheduler(scheduler, options, **defaults)))


def make_ddim(unet=None, **options):
    """Unconditional pixels whose pipeline steps with DDIM."""
    from diffusers import DDIMPipeline

    return _quiet(DDIMPipeline(_unet2d(**unet or {}), _scheduler("DDIMScheduler", options, clip_sample=False)))


def make_score_sde_ve(**options):
    """NCSN++: conditioned on sigma through Fourier features, answers the score; pixels in [0, 1].

    The blocks with skip connections fix their own numbers of groups, which 32 channels satisfy.
    """
    from diffusers import ScoreSdeVePipeline

    unet = _unet2d(
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
        block_out_channels=(32, 32),
        mid_block_type=None,
    )
    return _quiet(ScoreSdeVePipeline(unet, _scheduler("ScoreSdeVeScheduler", options)))


def make_dit(scheduler="DDIMScheduler", learned=True, **options):
    """Latents 4 × 8 × 8 of 1,000 classes and a null label; `learned`: twice as many outputs, for the variance."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = _networks(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8 if learned else 4,
            num_layers=2,
            sample_size=SIDE,
            patch_size=2,
            num_embeds_ada_norm=1000,
        ),
        seed=7,
    )
    defaults = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    return _quiet(DiTPipeline(transformer, _vae(), _scheduler(scheduler, options, **defaults)))


def make_sd(prediction_type="epsilon", scheduler="DDIMScheduler", unet=None, **options):
    """Stable Diffusion 1.x (epsilon) or 2.x (v_prediction), latents 4 × 8 × 8, images 16 × 16."""
    from diffusers import StableDiffusionPipeline

    tokenizer, encoder = _clip()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    defaults = betas | {"steps_offset": 1, "timestep_spacing": "leading", "prediction_type": prediction_type}
    if scheduler == "DDIMScheduler":
        defaults |= {"clip_sample": False, "set_alpha_to_one": False}
    return _quiet(
        StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=_unet_condition(**unet or {}),
            scheduler=_scheduler(scheduler, options, **defaults),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def make_sdxl(scheduler="EulerDiscreteScheduler", force_zeros=True, **options):
    """Stable Diffusion XL: two text encoders, pooled text and time ids, latents 4 × 8 × 8."""
    from diffusers import StableDiffusionXLPipeline

    (tokenizer, encoder), (tokenizer_2, encoder_2) = _clip(), _clip(pooled=True, seed=5)
    unet = _unet_condition(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return _quiet(
        StableDiffusionXLPipeline(
            vae=_vae(scaling_factor=0.13025),
            text_encoder=encoder,
            text_encoder_2=encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=_scheduler(scheduler, options, **betas, steps_offset=1, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )
    )


def make_sd3(scheduler="FlowMatchEulerDiscreteScheduler", **options):
    """Stable Diffusion 3: two CLIP encoders and T5, flow matching with a static shift, latents 4 × 8 × 8."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    clips = [_clip(pooled=True, seed=seed) for seed in (4, 5)]
    tokenizer_3, encoder_3 = _t5(64)  # as wide as both CLIPs together
    transformer = _networks(
        lambda: SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=16,
            pooled_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=2 * SIDE,
        ),
        seed=8,
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=_scheduler(scheduler, options, shift=3.0),
            vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=clips[0][1],
            tokenizer=clips[0][0],
            text_encoder_2=clips[1][1],
            tokenizer_2=clips[1][0],
            text_encoder_3=encoder_3,
            tokenizer_3=tokenizer_3,
        )
    )


def make_flux(scheduler="FlowMatchEulerDiscreteScheduler", embedded=True, **options):
    """Flux: CLIP and T5, packed latents, dynamic shift; `embedded`: guidance is an input of the network (dev).

    Its own default is 256 × 256 pixels; ask for `height=16, width=16` (latents 4 × 8 × 8).
    """
    from diffusers import FluxPipeline, FluxTransformer2DModel

    (tokenizer, encoder), (tokenizer_2, encoder_2) = _clip(), _t5()
    transformer = _networks(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=embedded,
        ),
        seed=9,
    )
    defaults = {"shift": 3.0, "use_dynamic_shifting": True} if scheduler == "FlowMatchEulerDiscreteScheduler" else {}
    return _quiet(
        FluxPipeline(
            scheduler=_scheduler(scheduler, options, **defaults),
            vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
    )


MAKERS = {
    "ddpm": make_ddpm,
    "ddim": make_ddim,
    "score_sde_ve": make_score_sde_ve,
    "dit": make_dit,
    "sd": make_sd,
    "sd_v": lambda: make_sd("v_prediction"),
    "sdxl": make_sdxl,
    "sd3": make_sd3,
    "flux": make_flux,
}
"""A pipeline of each family, by name."""
