"""From a model on disk to a card that changes its embeddings, and back to its first bits."""

import numpy as np

import lora
from lora.testing.plugin import requirement

TEXTS = ["open a file for reading", "boil pasta for ten minutes", ""]


def card(core, name, *, strength, seed, **metadata):
    """A card on every query and value projection of the encoder, by its real names."""
    rng = np.random.default_rng(seed)
    width = core.config.hidden_size
    weights = {
        f"encoder.layer.{layer}.attention.self.{kind}": lora.LowRank(
            rng.normal(scale=strength, size=(width, 8)).astype("f4"),
            rng.normal(scale=strength, size=(8, width)).astype("f4"),
        )
        for layer in range(core.config.num_hidden_layers)
        for kind in ("query", "value")
    }
    return lora.LoRACard(
        name, 8, 16.0, ("query", "value"), weights, metadata, base_model="all-MiniLM-L6-v2"
    )


@requirement("R9.4", "R5.3", "R1.13", "R5.6")
def test_a_card_travels_through_a_file_into_a_real_encoder_and_out_again(model_folder, tmp_path):
    engine = lora.ArrowEngine.from_pretrained(model_folder)
    base = engine.encode(TEXTS)
    description = "reading and writing files in Python"
    plain = card(engine.base, "docs", strength=0.1, seed=0, description=description)
    signed = lora.LoRACard(
        *(plain.name, plain.rank, plain.alpha, plain.target_modules, plain.weights, plain.metadata),
        base_fingerprint=lora.fingerprint(engine.base, plain),
    )
    digest = lora.save(signed, tmp_path / "docs.lora.arrow")
    assert lora.load(tmp_path / "docs.lora.arrow", verify=digest) == signed

    assert engine.load_lora(tmp_path / "docs.lora.arrow") == "docs"
    assert len(engine.manager.injected) == 12
    tuned = engine.encode(TEXTS)
    assert np.abs(tuned - base).max(axis=1).min() > 0.01  # every text has moved
    np.testing.assert_allclose(np.linalg.norm(tuned, axis=1), 1, rtol=1e-6)

    routed = engine.encode_with_lora(TEXTS, intent_query="how do I write to a file?")
    assert [route.name for route in routed.routes] == ["docs"]
    np.testing.assert_allclose(routed.embeddings, tuned, atol=1e-5)
    abstained = engine.encode_with_lora(TEXTS, intent_query="the colour of the sea")
    assert abstained.routes == ()
    np.testing.assert_array_equal(abstained.embeddings, base)

    engine.remove_lora("docs")
    np.testing.assert_array_equal(engine.encode(TEXTS), base)
    assert engine.manager.model is engine.base
    assert engine.manager.list_cards() == {}
