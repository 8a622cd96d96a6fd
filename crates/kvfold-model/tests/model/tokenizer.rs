//! Text to ids and back, at once and piece by piece.

use crate::common::{Fixture, TOKENIZER, says};
use kvfold_model::{Checkpoint, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

fn stories() -> Tokenizer {
    Tokenizer::from_json(TOKENIZER.as_bytes(), "tokenizer.json").unwrap()
}

/// What the stream makes of `ids`, in pieces.
fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = tokenizer.stream(true);
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    pieces.extend(stream.finish().unwrap());
    pieces
}

#[test]
fn the_first_token_is_added_on_request() {
    let tokenizer = stories();
    let with = tokenizer.encode("Once upon a time", true).unwrap();
    let without = tokenizer.encode("Once upon a time", false).unwrap();
    assert_eq!(with[0], 1);
    assert_eq!(with[1..], without);
    assert_eq!(tokenizer.token_id("<s>"), Some(1));
    assert_eq!(tokenizer.decode(&with, true).unwrap(), "Once upon a time");
    assert!(tokenizer.decode(&with, false).unwrap().starts_with("<s>"));
}

#[test]
fn truncation_and_padding_of_the_training_script_are_off() {
    let mut json: Value = serde_json::from_str(TOKENIZER).unwrap();
    json["truncation"] = json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
    json["padding"] = json!({
        "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"
    });
    let text = "Once upon a time, there was a little girl named Lily.";
    let spoilt = Tokenizer::from_json(json.to_string().as_bytes(), "tokenizer.json").unwrap();
    assert_eq!(spoilt.encode(text, true).unwrap(), stories().encode(text, true).unwrap());
}

#[test]
fn a_character_of_several_tokens_comes_in_one_piece() {
    let tokenizer = stories();
    let ids = tokenizer.encode("a 🦙 b", false).unwrap();
    assert!(ids.len() > 6, "the llama should take four byte tokens");
    let pieces = pieces(&tokenizer, &ids);
    assert!(pieces.iter().any(|piece| piece.contains('🦙')), "{pieces:?}");
    assert_eq!(pieces.concat(), "a 🦙 b");
}

#[test]
fn an_unfinished_character_comes_at_the_end() {
    let tokenizer = stories();
    let ids = tokenizer.encode("🦙", false).unwrap();
    let torn = &ids[..ids.len() - 1];
    assert!(pieces(&tokenizer, torn).concat().ends_with('\u{fffd}'));
}

#[test]
fn noise_is_not_held_back_for_ever() {
    let tokenizer = stories();
    let mut stream = tokenizer.stream(true);
    let byte = tokenizer.token_id("<0xFF>").unwrap();
    let returned = (0..100).filter(|_| stream.push(byte).unwrap().is_some()).count();
    assert!(returned >= 10, "{returned} pieces");
}

#[test]
fn an_id_without_a_token_adds_nothing() {
    let tokenizer = stories();
    assert_eq!(tokenizer.decode(&[100_000], true).unwrap(), "");
    assert_eq!(pieces(&tokenizer, &[100_000; 20]).concat(), "");
}

#[test]
fn what_is_no_tokenizer_is_refused() {
    for text in ["", "{}", "[", "{\"model\":7}"] {
        let error = Tokenizer::from_json(text.as_bytes(), "x/tokenizer.json").unwrap_err().to_string();
        says(&error, &["x/tokenizer.json: invalid tokenizer"]);
    }
}

#[test]
fn a_token_without_an_embedding_is_refused() {
    let mut fixture = Fixture::new();
    let added = json!({
        "id": 512, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true
    });
    fixture.tokenizer["added_tokens"].as_array_mut().unwrap().push(added);
    says(&fixture.refused(), &["tokenizer.json: token `<pad>` has id 512", "`vocab_size` in config.json is 512"]);
}

proptest! {
    #[test]
    fn pieces_make_up_the_text(text in "([a-zA-Z ,.éß🦙中\n]|\\PC){0,40}") {
        let tokenizer = stories();
        // A `�` of the text's own looks like a torn character and may be cut differently.
        let text = text.replace('\u{fffd}', "?");
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(pieces(&tokenizer, &ids).concat(), tokenizer.decode(&ids, true).unwrap());
    }

    #[test]
    fn no_ids_are_a_panic_and_none_are_lost(ids in prop::collection::vec(0u32..600, 0..60)) {
        let tokenizer = stories();
        let streamed = pieces(&tokenizer, &ids).concat();
        let whole = tokenizer.decode(&ids, true).unwrap();
        // Where the bytes are valid the two agree; noise may be cut differently.
        if !whole.contains('\u{fffd}') && !streamed.contains('\u{fffd}') {
            prop_assert_eq!(streamed, whole);
        }
    }
}

#[test]
fn the_tokenizers_file_is_kept_byte_for_byte() {
    assert_eq!(Checkpoint::open("stories260k").unwrap().tokenizer.json(), TOKENIZER.as_bytes());
}
