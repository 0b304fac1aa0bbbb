"""Nodes and samplers run as the host runs them, in one call each."""

import importlib
from types import SimpleNamespace

import torch
import worlds
from sentences import one_sentence
from unet_passes import UNetPasses
from worlds import KV_PROMPT, MeanColours, World, seeded, widths_of

OWN_FORMAT = {"format": "lcm-lookahead-encoder", "format_version": "1"}


def host_node(module: str, name: str, *args):
    """First output of a node of the host, whichever schema it has."""
    node = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    out = node.execute(*args) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(*args)
    return (out.result if hasattr(out, "result") else out)[0]


def guider_of(model, positive, negative, cfg):
    """The host's own guider with these conditions."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def sample(
    model, positive, negative, latent, cfg=3.0, steps=3, sampler="euler", guider=None, seed=1, sigmas=None, **options
):
    """Sample with the host's own guider and sampler."""
    import comfy.samplers

    guider = guider or guider_of(model, positive, negative, cfg)
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed, **options)


def denoised(model, positive, negative, x, sigma, cfg=1.0, guider=None):
    """What the guider returns at (x, sigma): one model call inside an ordinary run of the host."""
    import comfy.samplers

    guider = guider or guider_of(model, positive, negative, cfg)
    found = []

    def call_once(model_k, noise, sigmas, extra_args=None, callback=None, disable=None):
        found.append(model_k(x, sigmas[:1].expand(x.shape[0]), **extra_args))
        return noise

    guider.sample(
        torch.zeros_like(x), torch.zeros_like(x), comfy.samplers.KSAMPLER(call_once), torch.tensor([sigma, 0.0]), seed=1
    )
    return found[0]


def interrupt(*_) -> None:
    """What a user's interrupt does at the next call that heeds it: raises InterruptProcessingException."""
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    comfy.model_management.throw_exception_if_processing_interrupted()


class HostTools:
    """Helpers of the host's tests, as the fixture `tools`; `pack` is the loaded pack, through which its nodes run."""

    watch = UNetPasses
    host_node = staticmethod(host_node)
    guider = staticmethod(guider_of)
    sample = staticmethod(sample)
    denoised = staticmethod(denoised)
    one_sentence = staticmethod(one_sentence)
    with_lora = staticmethod(worlds.with_lora)
    picture = staticmethod(worlds.picture)
    widths = staticmethod(widths_of)
    make_clip_vision = staticmethod(worlds.make_clip_vision)
    make_model = staticmethod(worlds.make_model)
    unet_config = staticmethod(worlds.unet_config)
    diffusers_unet = staticmethod(worlds.diffusers_unet)

    def __init__(self, pack: SimpleNamespace):
        self.pack = pack

    def run(self, node: str, *args, **options):
        """The first output of one of the pack's nodes."""
        return self.pack.nodes[node].execute(*args, **options).result[0]

    def encoder(self, weights, metadata=None):
        """The encoder that the pack loads of a file with these weights."""
        file = self.pack.module("lookahead.files.encoder_file").from_tensors(
            weights, metadata or {}, "test.safetensors"
        )
        return self.pack.module("nodes.reference.encoder").LoadedEncoder(file)

    def reference(self, world: World, image, **options):
        """A reference for the image prompt alone."""
        encoder = self.encoder(world.encoder)
        return self.run("LookaheadEncodeReference", encoder, world.clip_vision, image, **{"size": 64, **options})

    def apply(self, model, reference, **options):
        """A model with an image prompt."""
        return self.run("LookaheadApplyImagePrompt", model, reference, **options)

    def kv_weights(self, world: World, rank: int = 2, seed: int = 8) -> dict[str, torch.Tensor]:
        """A KV encoder's low-rank weights for this world, under their names in an encoder file."""
        names = self.pack.module("lookahead.files.block_names").block_names(world.depth, world.middle)
        last = max(name.diffusers for name in names if name.diffusers.startswith("up_blocks"))
        g, out = torch.Generator().manual_seed(seed), {}
        for name, width in zip(names, widths_of(world), strict=True):
            layers = {f"kv_export.{name.diffusers}.attn1.to_{x}": width for x in "kv"}
            if name.diffusers != last:
                for x in ("to_q", "to_k", "to_v", "to_out.0"):
                    layers[f"kv_encoder.{name.diffusers}.attn1.{x}"] = width
                    from_text = x in ("to_k", "to_v")
                    layers[f"kv_encoder.{name.diffusers}.attn2.{x}"] = world.context if from_text else width
            for layer, width_in in layers.items():
                out[f"{layer}.lora_A.weight"] = seeded((rank, width_in), g)
                out[f"{layer}.lora_B.weight"] = seeded((width, rank), g, 0.5)
        return out

    def kv_encoder(self, world: World, **options):
        """An encoder for image prompt and KV injection."""
        return self.encoder(world.encoder | self.kv_weights(world, **options), OWN_FORMAT)

    def kv_reference(self, world: World, image, encoder=None, **options):
        """A reference for KV injection. With an encoder it is an image prompt as well."""
        options = {"size": 64, "vae": MeanColours(), "conditioning": world.text(KV_PROMPT), **options}
        return self.run("LookaheadEncodeReference", encoder, encoder and world.clip_vision, image, **options)

    def inject(self, model, reference, **options):
        """A model with KV injection."""
        return self.run("LookaheadApplyKVInjection", model, reference, **options)

    def three_scales(self, *args, **options):
        """The pack's own guider."""
        return self.run("LookaheadGuider", *args, **options)
