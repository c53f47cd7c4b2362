//! The table of a run.

use super::plan::Plan;
use super::score::{Score, Tally, random_share};
use crate::show;
use crate::table::{self, Column};
use serde::Serialize;

/// One line of the table. What does not apply is `None`; so is an unknown cost.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    model: String,
    jobs: Option<u64>,
    ok: Option<u64>,
    failed: Option<u64>,
    correct: Option<f64>,
    p50_latency_ms: Option<u64>,
    tokens_per_second: Option<f64>,
    cost_nanodollars: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    cost_estimated: bool,
    #[serde(skip)]
    is_baseline: bool,
}

/// The name of the baseline's row.
const RANDOM: &str = "random choice";

/// A row for each model, and one for the baseline when there is one.
pub(crate) fn rows(plan: &Plan, score: &Score) -> Vec<Row> {
    let mut rows: Vec<Row> =
        plan.experiment.models.iter().zip(score.tallies()).map(|(model, tally)| row(model, tally)).collect();
    rows.extend(random_share(plan).map(baseline));
    rows
}

fn row(model: &str, tally: &Tally) -> Row {
    Row {
        model: model.to_owned(),
        jobs: Some(tally.jobs),
        ok: Some(tally.ok),
        failed: Some(tally.failed),
        correct: tally.correct_share(),
        p50_latency_ms: tally.p50_ms(),
        tokens_per_second: tally.tokens_per_second(),
        cost_nanodollars: tally.cost_nanodollars(),
        cost_estimated: tally.cost_estimated,
        is_baseline: false,
    }
}

fn baseline(correct: f64) -> Row {
    Row {
        model: RANDOM.to_owned(),
        jobs: None,
        ok: None,
        failed: None,
        correct: Some(correct),
        p50_latency_ms: None,
        tokens_per_second: None,
        cost_nanodollars: None,
        cost_estimated: false,
        is_baseline: true,
    }
}

const COLUMNS: [Column; 8] = [
    Column::Text("model"),
    Column::Number("jobs"),
    Column::Number("ok"),
    Column::Number("failed"),
    Column::Number("correct"),
    Column::Number("p50 latency"),
    Column::Number("tokens/s"),
    Column::Number("cost"),
];

/// The table for people.
pub(crate) fn table(rows: &[Row]) -> String {
    table::render(COLUMNS, rows.iter().map(cells).collect())
}

fn cells(row: &Row) -> [String; 8] {
    let nothing = || show::NOTHING.to_owned();
    let count = |count: Option<u64>| count.map_or_else(nothing, |count| count.to_string());
    let cost = match row.cost_nanodollars {
        Some(cost) => show::money(cost, row.cost_estimated),
        None if row.is_baseline => nothing(),
        None => "unknown".to_owned(),
    };
    [
        row.model.clone(),
        count(row.jobs),
        count(row.ok),
        count(row.failed),
        row.correct.map_or_else(nothing, |share| format!("{:.1} %", share * 100.0)),
        row.p50_latency_ms.map_or_else(nothing, show::milliseconds),
        row.tokens_per_second.map_or_else(nothing, |rate| format!("{rate:.1}")),
        cost,
    ]
}

/// The table for programs, one object a line.
pub(crate) fn json(rows: &[Row]) -> serde_json::Result<String> {
    let lines = rows.iter().map(serde_json::to_string).collect::<serde_json::Result<Vec<String>>>()?;
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::sample;
    use super::super::score::tests::job;
    use super::*;

    #[test]
    fn the_table_has_a_row_per_model_and_the_baseline() {
        let plan = sample();
        let mut score = Score::new(&plan);
        for (index, text) in ["4", "5", "x"].into_iter().enumerate() {
            score.note_job(&plan, &plan.request_id(index), &job(text, 0, 2));
        }
        for index in 3..6 {
            let unpriced = genmill_client::v1::Job { cost: None, ..job("6", 0, 1) };
            score.note_job(&plan, &plan.request_id(index), &unpriced);
        }
        let expect = "\
MODEL          JOBS  OK  FAILED  CORRECT  P50 LATENCY  TOKENS/S        COST
vllm_a            3   3       0   66.7 %        2.0 s      15.0  $0.0000003
hf_b              3   3       0   33.3 %        1.0 s      30.0     unknown
random choice     -   -       -   33.3 %            -         -           -";
        assert_eq!(table(&rows(&plan, &score)), expect);
        let json = json(&rows(&plan, &score)).unwrap();
        assert_eq!(json.lines().count(), 3);
        assert!(json.lines().nth(1).unwrap().ends_with("\"cost_nanodollars\":null}"), "{json}");
    }

    #[test]
    fn a_model_that_was_refused_has_no_numbers_but_counts() {
        let plan = sample();
        let mut score = Score::new(&plan);
        for index in 0..6 {
            score.note_refused(&plan.request_id(index));
        }
        let expect = "\
MODEL          JOBS  OK  FAILED  CORRECT  P50 LATENCY  TOKENS/S     COST
vllm_a            3   0       3    0.0 %            -         -  unknown
hf_b              3   0       3    0.0 %            -         -  unknown
random choice     -   -       -   33.3 %            -         -        -";
        assert_eq!(table(&rows(&plan, &score)), expect);
    }
}
