//! What came of it, for people and for machines.

use serde::Serialize;

/// What came of a case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// Which case: a row of docs/pardo-contract.md.
    pub name: String,
    /// Whether the program did what the contract asks.
    pub passed: bool,
    /// What was sent.
    pub sent: String,
    /// What the contract asks.
    pub expected: String,
    /// What came back.
    pub got: String,
    /// What to do about it; empty when there is nothing to do.
    pub hint: String,
    /// How long it took.
    pub seconds: f64,
}

/// What came of all cases.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// How it was joined.
    pub transport: String,
    /// What was expected of it.
    pub expect: String,
    /// Each case.
    pub cases: Vec<CaseReport>,
}

impl Report {
    /// Whether every case passed.
    #[must_use]
    pub fn has_passed(&self) -> bool {
        self.cases.iter().all(|case| case.passed)
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("{} on {}, expected: {}\n\n", self.command.join(" "), self.transport, self.expect);
        for case in &self.cases {
            if case.passed {
                text.push_str(&format!("ok    {}: {}\n", case.name, case.got));
            } else {
                text.push_str(&format!(
                    "FAIL  {}\n      sent:     {}\n      expected: {}\n      got:      {}\n      to do:    {}\n",
                    case.name, case.sent, case.expected, case.got, case.hint
                ));
            }
        }
        let passed = self.cases.iter().filter(|case| case.passed).count();
        text.push_str(&format!("\n{passed} of {} cases passed", self.cases.len()));
        text.push_str(if self.has_passed() {
            ": the program keeps the contract of a ParDo.\n"
        } else {
            ". The contract is docs/pardo-contract.md; `argo-streams conform --list` prints its cases.\n"
        });
        text
    }
}
