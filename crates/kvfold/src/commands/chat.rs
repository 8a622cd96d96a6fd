//! `kvfold chat`: a conversation in the terminal, and what the cache holds of it.

use crate::cli::ChatArgs;
use crate::error::AppError;
use crate::interrupt::Interrupt;
use crate::output;
use kvfold_engine::scheduler::Limits;
use kvfold_engine::{
    Batcher, Engine, EngineError, Event, Kind, Options, PrefixSettings, Request, Sequence, Session, Stop,
};
use kvfold_kernels::FastCpu;
use kvfold_model::{Chat, ChatTemplate, Checkpoint};
use kvfold_report::format;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::Value;
use std::path::{Path, PathBuf};
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
    let (messages, session) = (Vec::new(), args.session.clone());
    let mut talk = Talk { checkpoint, template, engine, options, most, messages, full: args.full, session };
    match &args.session {
        Some(path) if path.exists() => talk.take_up(path)?,
        _ => talk.begin(args.system.as_deref()),
    }
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
    /// Where it is kept.
    session: Option<PathBuf>,
}

/// What has seen some tokens.
struct Seen {
    tokens: Vec<u32>,
    sequence: Sequence,
}

impl Talk {
    fn begin(&mut self, system: Option<&str>) {
        self.messages = system.map(|text| Chat::message("system", text)).into_iter().collect();
    }

    fn has_system(&self) -> bool {
        self.messages.first().is_some_and(|message| message["role"] == "system")
    }

    /// Goes on with a conversation that was kept.
    fn take_up(&mut self, path: &Path) -> Result<(), AppError> {
        let Session { tokens, sequence, note } = self.engine.load(path)?;
        self.messages = serde_json::from_str(&note).map_err(|error| AppError::Text {
            file: path.display().to_string(),
            reason: format!("its note is no conversation ({error}); give a file that `kvfold chat --session` wrote"),
        })?;
        self.full |= sequence.is_full();
        output::note(&format!("going on after {} messages", self.messages.len()));
        output::note(&status(&self.engine, &sequence, ""));
        batcher(&mut self.engine).engine_mut().keep_prefix(&tokens, sequence);
        Ok(())
    }

    /// Answers a message. One that the model cannot answer is as if it had never been said.
    fn say(&mut self, text: &str, interrupt: &Interrupt) -> Result<(), AppError> {
        self.messages.push(Chat::message("user", text));
        match interrupt.deferred(|asked| self.answer(asked)) {
            Ok((answer, seen)) => {
                self.messages.push(Chat::message("assistant", &answer));
                self.keep(seen.as_ref());
            }
            Err(error @ (AppError::Engine(_) | AppError::Model(_))) => {
                self.messages.pop();
                output::note(&format!("{error}"));
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Keeps the conversation, if that is wanted. Where it cannot be kept it goes on all the same.
    fn keep(&self, seen: Option<&Seen>) {
        if let (Some(path), Some(Seen { tokens, sequence })) = (&self.session, seen) {
            let note = Value::from(self.messages.clone()).to_string();
            if let Err(error) = self.engine.save(sequence, tokens, &note, path) {
                output::note(&format!("{error}"));
            }
        }
    }

    /// The answer, and the cache that has seen it, if it got so far.
    fn answer(&mut self, asked: &dyn Fn() -> bool) -> Result<(String, Option<Seen>), AppError> {
        let Self { checkpoint, template, engine, options, most, messages, full, .. } = self;
        let prompt = checkpoint.tokenizer.encode(&template.render(&Chat::new(messages.clone()))?, false)?;
        let room = engine.model().shape.context.saturating_sub(prompt.len());
        let mut options = options.clone();
        options.stop.max_new_tokens = most.unwrap_or(room).min(room).max(1);
        let mut stream = checkpoint.tokenizer.stream_after(&prompt)?;
        let kind = Kind { full: *full, trace: false };
        let (mut tokens, read) = (prompt.clone(), prompt.len());
        let mut batcher = batcher(engine);
        let id = batcher.submit(Request { kind, ..Request::new(prompt, options) })?;
        let (mut answer, mut began) = (String::new(), None);
        let (sequence, cached) = 'answer: loop {
            for event in batcher.step()? {
                match event {
                    Event::Token { token, .. } => {
                        tokens.push(token);
                        began.get_or_insert_with(Instant::now);
                        if let Some(piece) = stream.push(token)? {
                            output::piece(&piece)?;
                            answer.push_str(&piece);
                        }
                    }
                    Event::Finished { sequence, cached, .. } => break 'answer (Some(sequence), cached),
                    // Of requests with wishes that this one does not have.
                    Event::Prompt { .. } | Event::Failed { .. } => {}
                }
            }
            if asked() {
                let cached = batcher.cached(id);
                break 'answer (batcher.cancel(id), cached);
            }
        };
        drop(batcher);
        if let Some(rest) = stream.finish()? {
            output::piece(&rest)?;
            answer.push_str(&rest);
        }
        output::line("")?;
        // The first token's time is the prompt's.
        let new = (tokens.len() - read).saturating_sub(1);
        let rate = began.map_or(0.0, |began| new as f64 / began.elapsed().as_secs_f64());
        let seen = sequence.map(|sequence| {
            let computed = format!("; {cached} kept from before; {}", format::rate(rate));
            output::note(&status(engine, &sequence, &computed));
            // The last one has not been read.
            tokens.truncate(sequence.tokens());
            Seen { tokens, sequence }
        });
        Ok((answer, seen))
    }
}

/// One answer at a time, whose beginnings the engine keeps for the next.
fn batcher(engine: &mut Engine<FastCpu>) -> Batcher<'_, FastCpu> {
    let settings = PrefixSettings { most: KEPT, ..PrefixSettings::default() };
    Batcher::new(engine, Limits { tokens: STEP, running: 1 }, 1.0).with_prefixes(settings)
}

/// What the cache holds, and more.
fn status(engine: &Engine<FastCpu>, sequence: &Sequence, more: &str) -> String {
    let held = sequence.held();
    format!(
        "[{} tokens in {:.1} slots, {}; {} of {}, {}{more}]",
        held.tokens,
        held.tokens as f64 / held.logical_ratio(),
        format::ratio(held.logical_ratio()),
        format::bytes(engine.usage(sequence).bytes() as u64),
        format::bytes(engine.dense_usage(held.tokens).bytes() as u64),
        format::ratio(engine.physical_ratio(sequence)),
    )
}
