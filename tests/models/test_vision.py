"""Packed streams with images: log-probabilities, values and gradients are those of transformers' own model on
each sequence alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from rayrlhf.batch import PackedBatch, pack_examples, pack_samples, pack_values, tokens_of
from rayrlhf.commands.merge_lora import main as merge_lora
from rayrlhf.config.model import LoraConfig, ModelConfig, TrainedModelConfig
from rayrlhf.data.images import opened
from rayrlhf.models.adapters import TrainedAdapter, adapted_layers, adapter_weights, not_adapted, weights_of
from rayrlhf.models.export import export_causal_lm
from rayrlhf.models.load import adapt, load_critic, load_policy
from rayrlhf.models.vision import tower_of
from rayrlhf.samples import EncodedImage, Example, Prompt, Sample, TokenSequence
from tests.tiny_vision import IMAGE_PAD, VISION_START, image, image_ids, make_tiny_vision

CPU = torch.device("cpu")
WIDE, TALL, SMALL = (
    image(width=40, height=16, seed=1),
    image(width=8, height=24, seed=2),
    image(width=16, height=16, seed=3),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_vision(tmp_path_factory.mktemp("vision") / "model", tied=False)


def sample(index: int, prompt_ids: list[int], response: list[int], *images: EncodedImage) -> Sample:
    return Sample(
        group_id=index,
        sample_index=0,
        prompt=Prompt(index, prompt_ids, "", images=images),
        response_ids=response,
        response="",
        rollout_logprobs=[0.0] * len(response),
        loss_mask=[1] * len(response),
        policy_versions=[0] * len(response),
        truncated=False,
        score=0.0,
    )


SAMPLES = [
    sample(0, [1, 4, *image_ids(WIDE), 100, 101, 2, 5], [60, 61, 2], WIDE),
    sample(1, [1, 4, 77, 78, 2, 5], [70, 71, 72]),  # without an image
    sample(2, [1, 4, *image_ids(TALL), 99, *image_ids(SMALL), 2, 5], [80, 2], TALL, SMALL),
    # The same image again, and image tokens that the policy has sampled.
    sample(3, [1, 4, *image_ids(WIDE), 90, 2, 5], [IMAGE_PAD, VISION_START, IMAGE_PAD, 2], WIDE),
]


def own_hidden(model: str, sample: Sample, causal_lm: Any) -> Tensor:
    """Final hidden states [t, H] by transformers alone, with its own positions and merge of images."""
    ids = torch.tensor([[*sample.prompt.prompt_ids, *sample.response_ids]])
    if not sample.prompt.images:
        return causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    processor = AutoImageProcessor.from_pretrained(model)
    made = processor(images=[opened(each.content) for each in sample.prompt.images], return_tensors="pt")
    kinds = (ids == IMAGE_PAD).int()
    kinds[:, len(sample.prompt.prompt_ids) :] = 0
    # transformers takes every image token for an image: those of a response are embedded beforehand.
    if (ids[:, len(sample.prompt.prompt_ids) :] == IMAGE_PAD).any():
        places = kinds[0].bool()
        embedded = causal_lm.get_input_embeddings()(ids)[0].clone()
        embedded[places] = torch.cat(
            causal_lm.get_image_features(made["pixel_values"], made["image_grid_thw"]).pooler_output
        )
        positions, _ = causal_lm.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=made["image_grid_thw"]
        )
        output = causal_lm.model(inputs_embeds=embedded[None], position_ids=positions, use_cache=False)
        return output.last_hidden_state[0]
    return causal_lm.model(
        input_ids=ids,
        pixel_values=made["pixel_values"],
        image_grid_thw=made["image_grid_thw"],
        mm_token_type_ids=kinds,
        use_cache=False,
    ).last_hidden_state[0]


def own_logprobs(model: str, sample: Sample, causal_lm: Any) -> Tensor:
    """Of all tokens but the first, [t - 1]."""
    ids = torch.tensor([*sample.prompt.prompt_ids, *sample.response_ids])
    logits = causal_lm.lm_head(own_hidden(model, sample, causal_lm)).float()
    return logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]


def responses(logprobs: Tensor, batch: PackedBatch) -> list[Tensor]:
    sequences = logprobs.split(batch.cu_seqlens.diff().tolist())
    return [part[-len(each.response_ids) :] for part, each in zip(sequences, SAMPLES, strict=True)]


def policy_of(model: str) -> Any:
    config = ModelConfig(path=model, dtype="float32")
    return load_policy(config, model, device=CPU, chunk_tokens=8)


def test_packed_logprobs_are_those_of_each_sequence_alone(model: str) -> None:
    batch, policy = pack_samples(SAMPLES), policy_of(model)
    causal_lm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        output = policy(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask, images=batch.images
        )
        found = responses(output.logprobs, batch)
        wanted = [own_logprobs(model, each, causal_lm)[-len(each.response_ids) :] for each in SAMPLES]
        blind = policy(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    without = responses(blind.logprobs, batch)
    assert (without[0] - found[0]).abs().max() > 0.1, "the image matters"


def test_packed_gradients_are_those_of_each_sequence_alone(model: str) -> None:
    batch, policy = pack_samples(SAMPLES), policy_of(model)
    output = policy(
        batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask, images=batch.images
    )
    (-output.logprobs.sum()).backward()
    causal_lm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    for each in SAMPLES:
        (-own_logprobs(model, each, causal_lm)[-len(each.response_ids) :].sum()).backward()
    theirs = dict(causal_lm.named_parameters())
    for name, parameter in policy.causal_lm.named_parameters():
        assert parameter.grad is not None, name
        wanted = theirs[name].grad
        assert wanted is not None, name
        scale = float(wanted.abs().max()) + 1e-3
        torch.testing.assert_close(parameter.grad / scale, wanted / scale, atol=2e-5, rtol=0, msg=name)


def test_a_batch_without_images_has_zero_gradients_in_the_tower(model: str) -> None:
    """All ranks must reduce the same gradients, whichever have images in a micro-batch."""
    policy, batch = policy_of(model), pack_samples([SAMPLES[1]])
    policy(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask).logprobs.sum().backward()
    for name, parameter in tower_of(policy.causal_lm).named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_critic_sees_the_images(model: str) -> None:
    batch = pack_samples(SAMPLES)
    critic = load_critic(ModelConfig(path=model, dtype="float32"), model, device=CPU)
    weight = torch.randn(critic.head.weight.shape, generator=torch.Generator().manual_seed(0))
    causal_lm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        critic.head.weight.copy_(weight)
        values = critic(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.images)
        for found, each in zip(values.split(batch.cu_seqlens.diff().tolist()), SAMPLES, strict=True):
            hidden = own_hidden(model, each, causal_lm)
            torch.testing.assert_close(found[1:], (hidden @ weight[0])[:-1], atol=1e-4, rtol=0)


def test_each_sequence_of_a_pair_has_the_images() -> None:
    ids = [1, 4, *image_ids(SMALL), 2, 5]
    pair = tuple(TokenSequence([*ids, answer], [0] * len(ids) + [1]) for answer in (60, 61))
    text = TokenSequence([1, 9], [0, 1])
    batch = pack_examples([Example(0, pair, images=(SMALL,)), Example(1, (text, text))])
    assert batch.images == ((SMALL,), (SMALL,), (), ())


def test_critics_and_served_models_get_the_images() -> None:
    batch = pack_samples(SAMPLES)
    assert tokens_of(batch).images == batch.images == tuple(each.prompt.images for each in SAMPLES)
    values = torch.zeros(batch.num_tokens)
    assert pack_values(batch, values, values).to("cpu").images == batch.images


def test_too_few_image_tokens_are_an_error(model: str) -> None:
    policy = policy_of(model)
    batch = pack_samples([sample(0, [1, 4, *image_ids(SMALL)[1:3], 2, 5], [60], SMALL)])
    with pytest.raises(ValueError, match="2 image tokens for images of 4"):
        policy(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask, 1.0, images=batch.images
        )


def test_another_image_processor_than_at_preparation_is_an_error(model: str) -> None:
    policy, wrong = policy_of(model), EncodedImage(SMALL.content, 3)
    batch = pack_samples([sample(0, [1, 4, *image_ids(wrong), 2, 5], [60], wrong)])
    with pytest.raises(ValueError, match=r"images of \[4\] tokens, prepared as \[3\]"):
        policy(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.loss_mask, 1.0, images=batch.images
        )


@pytest.mark.parametrize("targets", [None, ["q_proj", "gate_proj"]])
def test_adapters_are_on_the_language_model_only(model: str, targets: list[str] | None) -> None:
    """The tower has layers of the same names (gate_proj)."""
    policy = policy_of(model)
    config = TrainedModelConfig(path=model, lora=LoraConfig(rank=4, target_modules=targets))
    adapt(config, policy.causal_lm, device=CPU, seed=0)
    names = list(adapted_layers(policy.causal_lm))
    assert names and all("language_model" in name for name in names)
    trained = {id(parameter) for _, parameter in adapter_weights(policy.causal_lm)}
    assert all((id(p) in trained) == p.requires_grad for p in policy.causal_lm.parameters())


def test_the_tower_can_be_frozen(model: str) -> None:
    policy = policy_of(model)
    adapt(TrainedModelConfig(path=model, freeze_vision=True), policy.causal_lm, device=CPU, seed=0)
    frozen = {name for name, p in policy.causal_lm.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in policy.causal_lm.named_parameters() if ".visual." in name} != set()
    assert not {name for name, p in policy_of(model).causal_lm.named_parameters() if not p.requires_grad}


def test_pixel_values_are_kept_within_a_limit(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = policy_of(model).vision
    size = vision.pixels(SMALL.content).values.nbytes
    monkeypatch.setattr("rayrlhf.models.vision.CACHE_BYTES", 2 * size)
    others = [image(width=16, height=16, seed=seed).content for seed in range(10, 13)]
    for content in others:
        vision.pixels(content)
    assert list(vision._pixels) == others[1:]
    assert vision.pixels(others[1]) is vision.pixels(others[1])


def test_an_exported_adapter_is_merged_to_the_exported_model(model: str, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4)
    policy = policy_of(model)
    adapt(TrainedModelConfig(path=model, lora=lora), policy.causal_lm, device=CPU, seed=0)
    with torch.no_grad():
        for name, parameter in adapter_weights(policy.causal_lm):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    state = {name: parameter.detach() for name, parameter in adapter_weights(policy.causal_lm)}
    adapter = TrainedAdapter(lora, model, state, not_adapted(policy.causal_lm))
    merged = {weight.name: weight.merged() for weight in weights_of(policy.causal_lm)}
    tokenizer = AutoTokenizer.from_pretrained(model)
    export_causal_lm(policy.causal_lm, merged, tokenizer, tmp_path / "export", adapter=adapter)
    assert merge_lora([str(tmp_path / "export" / "adapter"), str(tmp_path / "merged")]) == 0
    found = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict()
        for name in ("export", "merged")
    ]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
