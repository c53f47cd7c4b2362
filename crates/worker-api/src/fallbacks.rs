//! Which models answer in place of others that fail, and when. Pure. Never here: asking them (`perform`).

use crate::failure::{Kind, POLICIES};
use genmill_core::gate::Covered;
use genmill_core::model::{BadModelName, Lane, ModelName};
use genmill_daemon::config;
use std::collections::BTreeMap;

/// Kinds of failure that another model may not have.
const USUAL: [Kind; 8] = [
    Kind::Auth,
    Kind::Quota,
    Kind::NotFound,
    Kind::Throttled,
    Kind::Overloaded,
    Kind::Transient,
    Kind::Timeout,
    Kind::Cut,
];

/// Kinds of failure for which a model is left alone for a while.
const FAILING: [Kind; 4] = [Kind::Overloaded, Kind::Transient, Kind::Timeout, Kind::Cut];

/// The fallbacks of all models.
#[derive(Clone, Debug, Default)]
pub struct Fallbacks(BTreeMap<ModelName, Fallback>);

/// The fallbacks of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// The models that are asked in its place, in order.
    pub to: Vec<ModelName>,
    on: Vec<Kind>,
}

/// What is wrong with the configured fallbacks.
#[derive(Debug, thiserror::Error)]
pub enum BadFallback {
    /// A name is none of a model.
    #[error("api.fallbacks: `{name}` is not the name of a model with its prefix")]
    Name {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: BadModelName,
    },
    /// A kind of failure is not known.
    #[error("api.fallbacks, of {model}: no failure is called `{name}`; there are {}", names())]
    Kind {
        /// The model.
        model: String,
        /// The name.
        name: String,
    },
}

fn names() -> String {
    POLICIES.iter().map(|policy| policy.name).collect::<Vec<_>>().join(", ")
}

impl Fallbacks {
    /// The fallbacks of a configuration.
    ///
    /// # Errors
    /// [`BadFallback`] when a name means nothing.
    pub fn new(settings: &[config::Fallback]) -> Result<Self, BadFallback> {
        let model =
            |name: &String| ModelName::parse(name).map_err(|source| BadFallback::Name { name: name.clone(), source });
        let fallback = |of: &config::Fallback| {
            let to = of.to.iter().map(model).collect::<Result<_, _>>()?;
            let kind = |name: &String| {
                let known = POLICIES.iter().find(|policy| policy.name == name.as_str()).map(|policy| policy.kind);
                known.ok_or_else(|| BadFallback::Kind { model: of.model.clone(), name: name.clone() })
            };
            let on = of.on.as_ref().map(|names| names.iter().map(kind).collect()).transpose()?;
            Ok((model(&of.model)?, Fallback { to, on: on.unwrap_or_else(|| USUAL.to_vec()) }))
        };
        settings.iter().map(fallback).collect::<Result<_, _>>().map(Self)
    }

    /// The fallbacks of a model, where it has any.
    #[must_use]
    pub fn of(&self, model: &ModelName) -> Option<&Fallback> {
        self.0.get(model)
    }

    /// The models of a lane for which others answer while they are held back.
    #[must_use]
    pub fn covered(&self, lane: &Lane) -> Covered {
        let that = |helps: &dyn Fn(&Fallback) -> bool| {
            let of_lane = self.0.iter().filter(|(model, fallback)| model.lane() == *lane && helps(fallback));
            of_lane.map(|(model, _)| model.as_str().to_owned()).collect()
        };
        Covered {
            throttled: that(&|fallback| fallback.helps(Kind::Throttled)),
            failing: that(&|fallback| FAILING.iter().any(|kind| fallback.helps(*kind))),
        }
    }

    /// Every model that is asked in place of another.
    pub fn models(&self) -> impl Iterator<Item = &ModelName> {
        self.0.values().flat_map(|fallback| &fallback.to)
    }
}

impl Fallback {
    /// Whether another model is asked after a failure.
    #[must_use]
    pub fn helps(&self, kind: Kind) -> bool {
        self.on.contains(&kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fallbacks(to: &str, on: Option<&str>) -> Result<Fallbacks, BadFallback> {
        let on = on.map(|kind| vec![kind.to_owned()]);
        Fallbacks::new(&[config::Fallback { model: "litellm_gpt-4o".to_owned(), to: vec![to.to_owned()], on }])
    }

    #[test]
    fn a_fallback_helps_where_another_model_may_do_better() {
        let fallbacks = fallbacks("openrouter_openai/gpt-4o", None).unwrap();
        let of = |name: &str| fallbacks.of(&ModelName::parse(name).unwrap());
        let fallback = of("litellm_gpt-4o").unwrap();
        assert_eq!(fallback.to, [ModelName::parse("openrouter_openai/gpt-4o").unwrap()]);
        assert!(fallback.helps(Kind::Overloaded) && !fallback.helps(Kind::Invalid));
        assert!(of("litellm_gpt-4").is_none());
    }

    #[test]
    fn a_model_is_covered_while_it_is_held_back_for_what_its_fallbacks_help_against() {
        let lane = ModelName::parse("litellm_gpt-4o").unwrap().lane();
        let covered = |on| fallbacks("openrouter_x/y", on).unwrap().covered(&lane);
        let of = |throttled: &[&str], failing: &[&str]| {
            let names = |of: &[&str]| of.iter().map(|name| (*name).to_owned()).collect();
            Covered { throttled: names(throttled), failing: names(failing) }
        };
        assert_eq!(covered(None), of(&["litellm_gpt-4o"], &["litellm_gpt-4o"]));
        assert_eq!(covered(Some("throttled")), of(&["litellm_gpt-4o"], &[]));
        assert_eq!(covered(Some("timeout")), of(&[], &["litellm_gpt-4o"]));
        assert!(covered(Some("context_overflow")).is_none());
        let other = ModelName::parse("openrouter_x/y").unwrap().lane();
        assert!(fallbacks("openrouter_x/y", None).unwrap().covered(&other).is_none());
    }

    #[test]
    fn the_kinds_may_be_chosen() {
        let fallbacks = fallbacks("openrouter_x/y", Some("context_overflow")).unwrap();
        let fallback = fallbacks.of(&ModelName::parse("litellm_gpt-4o").unwrap()).unwrap();
        assert!(fallback.helps(Kind::ContextOverflow) && !fallback.helps(Kind::Overloaded));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let told = fallbacks("gpt-4o", None).unwrap_err().to_string();
        assert_eq!(told, "api.fallbacks: `gpt-4o` is not the name of a model with its prefix");
        let told = fallbacks("openrouter_x/y", Some("slow")).unwrap_err().to_string();
        assert!(
            told.starts_with("api.fallbacks, of litellm_gpt-4o: no failure is called `slow`; there are auth, "),
            "{told}"
        );
    }
}
