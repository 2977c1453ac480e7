//! The engine as one agent may use it.
//!
//! In:    the agent's requests, as the front has planned them. Out: the same, within what its partition gives.
//! Always: an answer is never longer than the agent's cells beside its prompt; a prompt that cannot fit is refused at
//!         once, with what would. A child has its parent's partition unless it was put into one of its own.
//! Where:  how many cells are free this moment, and who goes first, is the engine's to decide.

use super::{Gpu, Standing};
use crate::engine::Engine;
use crate::store::Db;
use agentd_domain::engine::{Generate, Prompt};
use agentd_domain::fault::Report;
use agentd_domain::ids::AgentId;
use agentd_domain::plan::ceiling;
use agentd_gpu::admission::Refusal;
use agentd_serving::{Embeddings, EngineHandle, Leaving, Pending, Pieces, ServedModel};

/// What the front of one agent talks to.
pub struct Served {
    pub engine: Engine,
    pub gpu: Gpu,
    pub db: Db,
    pub agent: AgentId,
}

impl Served {
    /// Whose partition counts: the nearest of the agent and those above it who were put into one.
    async fn placed(&self) -> AgentId {
        let mut at = self.agent;
        for _ in 0..=ceiling::DEPTH_MAX {
            if !self.gpu.anybody_assigned() || self.gpu.is_assigned(at) {
                return at;
            }
            let row = self.db.call(move |store| store.agent(at)).await;
            match row.ok().flatten().and_then(|row| row.parent) {
                Some(parent) => at = parent,
                None => return self.agent,
            }
        }
        self.agent
    }

    async fn within(&self, mut request: Generate) -> Result<Generate, Report> {
        let whose = self.placed().await;
        let standing = self.gpu.standing(whose, &request.model);
        bound(&mut request, standing).map_err(|(needs_cells, prompt_cells)| {
            let partition = self.gpu.partition_of(whose);
            let has_cells = u64::from(standing.cells_most);
            Refusal::ContextExceedsBudget { partition, needs_cells, has_cells, prompt_cells }
                .report("the request was not run")
        })?;
        Ok(request)
    }
}

/// Shortens the answer to what is left beside the prompt, or says what would be needed at least: all cells, and those of
/// the prompt.
fn bound(request: &mut Generate, standing: Standing) -> Result<(), (u64, u64)> {
    if standing.cells_most == 0 {
        return Ok(());
    }
    // Only the engine can count a text's tokens; it has one at least.
    let prompt = match &request.prompt {
        Prompt::Tokens(tokens) => u32::try_from(tokens.len()).unwrap_or(u32::MAX),
        Prompt::Messages(_) | Prompt::Text(_) => 1,
    };
    let left = standing.cells_most.saturating_sub(prompt);
    if left == 0 {
        return Err((u64::from(prompt) + 1, prompt.into()));
    }
    request.max_tokens = match request.max_tokens {
        0 => left,
        wanted => wanted.min(left),
    };
    Ok(())
}

impl EngineHandle for Served {
    fn models(&self) -> Vec<ServedModel> {
        EngineHandle::models(&self.engine)
    }

    fn generate(&self, request: Generate, leaving: Leaving) -> Pending<'_, Pieces> {
        Box::pin(async move {
            let request = self.within(request).await?;
            EngineHandle::generate(&self.engine, request, leaving).await
        })
    }

    fn embed(&self, model: String, inputs: Vec<String>) -> Pending<'_, Embeddings> {
        EngineHandle::embed(&self.engine, model, inputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agentd_domain::engine::Sampling;

    fn request(prompt: Prompt, max_tokens: u32) -> Generate {
        Generate {
            model: "m".to_owned(),
            key: "k".to_owned(),
            prompt,
            sampling: Sampling::default(),
            max_tokens,
            stop: Vec::new(),
        }
    }

    #[test]
    fn an_answer_is_bounded_by_what_is_left_beside_the_prompt() {
        let standing = |cells_most| Standing { priority: 50, weight: 100, cells_most };
        let after = |prompt, max_tokens, cells_most| {
            let mut request = request(prompt, max_tokens);
            bound(&mut request, standing(cells_most)).map(|()| request.max_tokens)
        };
        let tokens = |count| Prompt::Tokens(vec![1; count]);
        assert_eq!(after(tokens(10), 0, 0), Ok(0), "without a limit of its own nothing changes");
        assert_eq!(after(tokens(10), 100_000, 0), Ok(100_000));
        assert_eq!(after(tokens(10), 0, 256), Ok(246));
        assert_eq!(after(tokens(10), 100_000, 256), Ok(246));
        assert_eq!(after(tokens(10), 5, 256), Ok(5));
        assert_eq!(after(tokens(256), 5, 256), Err((257, 256)));
        assert_eq!(
            after(Prompt::Text("words".to_owned()), 0, 1),
            Err((2, 1)),
            "a partition too small for a block"
        );
    }
}
