//! `kvfold chat`: a conversation in the terminal, and what the cache holds of it.

use super::generate::stream_after;
use crate::cli::ChatArgs;
use crate::error::AppError;
use crate::interrupt::Interrupt;
use crate::output;
use kvfold_engine::scheduler::Limits;
use kvfold_engine::{Batcher, Engine, EngineError, Event, Kind, Options, PrefixSettings, Request, Sequence, Stop};
use kvfold_kernels::FastCpu;
use kvfold_model::{Chat, ChatTemplate, Checkpoint};
use kvfold_report::format;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::Value;
use std::time::Instant;

const HELP: &str = "\
/full      answer with the full cache from now on, or again with the compressed one
/system T  begin anew with T as what the model is told first; without T with nothing
/new       begin anew
/help      this
/quit      leave, as Ctrl-D does";

/// Tokens of a pass at most: prompts are kept at multiples of the prefix cache's places anyway.
const STEP: usize = 512;

/// Beginnings that are kept: of the conversation, with either cache.
const KEPT: usize = 16;

pub(crate) fn run(args: &ChatArgs, interrupt: &Interrupt) -> Result<(), AppError> {
    let checkpoint = args.model.open()?;
    let template = ChatTemplate::of(&checkpoint)?;
    let engine = args.model.engine(&checkpoint);
    let stop = Stop { max_new_tokens: 1, at: checkpoint.stop_token_ids()?, min_new_tokens: 0 };
    let options = Options { sampler: args.sampling.sampler(), stop };
    options.validate(engine.model().shape.vocab).map_err(EngineError::from)?;
    let most = args.sampling.max_new_tokens;
    let mut talk = Talk { checkpoint, template, engine, options, most, messages: Vec::new(), full: args.full };
    talk.begin(args.system.as_deref());
    let failed = |error: ReadlineError| AppError::Setup { what: "read what you type", reason: error.to_string() };
    let mut editor = DefaultEditor::new().map_err(failed)?;
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            // Of a line that was begun nothing is kept.
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        // A history that is full is no reason to stop.
        let _ = editor.add_history_entry(line);
        match line.strip_prefix('/').map(|command| command.split_once(' ').unwrap_or((command, ""))) {
            None => talk.say(line, interrupt)?,
            Some(("full", _)) => {
                talk.full = !talk.full;
                output::note(if talk.full { "the full cache" } else { "the compressed cache" });
            }
            Some(("new", _)) => talk.messages.truncate(usize::from(talk.has_system())),
            Some(("system", text)) => talk.begin(Some(text.trim()).filter(|text| !text.is_empty())),
            Some(("quit" | "exit", _)) => return Ok(()),
            Some(("help", _)) => output::note(HELP),
            Some((other, _)) => output::note(&format!("there is no /{other}\n{HELP}")),
        }
    }
}

/// A conversation.
struct Talk {
    checkpoint: Checkpoint,
    template: ChatTemplate,
    engine: Engine<FastCpu>,
    options: Options,
    /// New tokens of an answer at most, if that is limited.
    most: Option<usize>,
    messages: Vec<Value>,
    full: bool,
}

impl Talk {
    fn begin(&mut self, system: Option<&str>) {
        self.messages = system.map(|text| Chat::message("system", text)).into_iter().collect();
    }

    fn has_system(&self) -> bool {
        self.messages.first().is_some_and(|message| message["role"] == "system")
    }

    /// Answers a message. One that the model cannot answer is as if it had never been said.
    fn say(&mut self, text: &str, interrupt: &Interrupt) -> Result<(), AppError> {
        self.messages.push(Chat::message("user", text));
        match interrupt.deferred(|asked| self.answer(asked)) {
            Ok(answer) => self.messages.push(Chat::message("assistant", &answer)),
            Err(error @ (AppError::Engine(_) | AppError::Model(_))) => {
                self.messages.pop();
                output::note(&format!("{error}"));
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn answer(&mut self, asked: &dyn Fn() -> bool) -> Result<String, AppError> {
        let Self { checkpoint, template, engine, options, most, messages, full } = self;
        let prompt = checkpoint.tokenizer.encode(&template.render(&Chat::new(messages.clone()))?, false)?;
        let room = engine.model().shape.context.saturating_sub(prompt.len());
        let mut options = options.clone();
        options.stop.max_new_tokens = most.unwrap_or(room).min(room).max(1);
        let mut stream = stream_after(checkpoint, &prompt)?;
        let kind = Kind { full: *full, trace: false };
        let settings = PrefixSettings { most: KEPT, ..PrefixSettings::default() };
        let mut batcher = Batcher::new(engine, Limits { tokens: STEP, running: 1 }, 1.0).with_prefixes(settings);
        let id = batcher.submit(Request { kind, ..Request::new(prompt, options) })?;
        let (mut answer, mut new, mut began) = (String::new(), 0, None);
        let sequence = 'answer: loop {
            for event in batcher.step()? {
                match event {
                    Event::Token { token, .. } => {
                        new += 1;
                        began.get_or_insert_with(Instant::now);
                        if let Some(piece) = stream.push(token)? {
                            output::piece(&piece)?;
                            answer.push_str(&piece);
                        }
                    }
                    Event::Finished { sequence, .. } => break 'answer Some(sequence),
                    // Of requests with wishes that this one does not have.
                    Event::Prompt { .. } | Event::Failed { .. } => {}
                }
            }
            if asked() {
                break 'answer batcher.cancel(id);
            }
        };
        drop(batcher);
        if let Some(rest) = stream.finish()? {
            output::piece(&rest)?;
            answer.push_str(&rest);
        }
        output::line("")?;
        let seconds = began.map_or(0.0, |began| began.elapsed().as_secs_f64());
        // The first token's time is the prompt's.
        let rate = if seconds > 0.0 { f64::from(new - 1) / seconds } else { 0.0 };
        if let Some(sequence) = sequence {
            output::note(&status(engine, &sequence, rate));
        }
        Ok(answer)
    }
}

/// What the cache holds.
fn status(engine: &Engine<FastCpu>, sequence: &Sequence, rate: f64) -> String {
    let (held, bytes) = (sequence.held(), engine.usage(sequence).bytes());
    let dense = engine.dense_usage(held.tokens).bytes();
    let physical = if bytes == 0 { 1.0 } else { dense as f64 / bytes as f64 };
    format!(
        "[{} tokens in {:.1} slots, {}; {} of {}, {}; {}]",
        held.tokens,
        held.tokens as f64 / held.logical_ratio(),
        format::ratio(held.logical_ratio()),
        format::bytes(bytes as u64),
        format::bytes(dense as u64),
        format::ratio(physical),
        format::rate(rate),
    )
}
