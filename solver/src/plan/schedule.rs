//! The ready queue: which vertices may start, as a state machine that never blocks.
//!
//! A vertex starts when all of its inputs are done, whatever stage it belongs to. After a failure nothing more starts;
//! what runs already is told to stop, and every vertex ends in exactly one of done, failed, cancelled.

use nacre_frontend::llb::{Definition, VertexId};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The build begins.
    Begin,
    /// A vertex has its result.
    Done(VertexId),
    /// A vertex failed, or ended because it was told to stop.
    Failed(VertexId),
    /// The user wants to stop.
    Interrupt,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Carry out this vertex.
    Start(VertexId),
    /// Tell what runs to stop; given once.
    Stop,
    /// This vertex will never start.
    Cancelled(VertexId),
    /// Nothing runs and nothing will.
    Finish,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waits for this many inputs.
    Waiting(usize),
    Running,
    Ended,
}

/// State of a build.
#[derive(Debug)]
pub struct Schedule {
    states: Vec<State>,
    users: Vec<Vec<VertexId>>,
    running: usize,
    stopping: bool,
}

impl Schedule {
    /// All vertices of a graph, none started.
    pub fn new(definition: &Definition) -> Self {
        let mut users = vec![Vec::new(); definition.vertices.len()];
        let mut states = Vec::with_capacity(definition.vertices.len());
        for (at, vertex) in definition.vertices.iter().enumerate() {
            let mut inputs: Vec<VertexId> = vertex.inputs.iter().flatten().copied().collect();
            inputs.sort_unstable();
            inputs.dedup();
            states.push(State::Waiting(inputs.len()));
            inputs.iter().for_each(|input| users[input.0].push(VertexId(at)));
        }
        Self { states, users, running: 0, stopping: false }
    }

    /// Takes an event, answers with what to do now, in order.
    pub fn step(&mut self, event: Event) -> Vec<Command> {
        let mut commands = Vec::new();
        match event {
            Event::Begin => {
                for at in 0..self.states.len() {
                    self.start_if_ready(VertexId(at), &mut commands);
                }
            }
            Event::Done(vertex) => {
                self.end(vertex);
                for user in std::mem::take(&mut self.users[vertex.0]) {
                    if let State::Waiting(count) = &mut self.states[user.0] {
                        *count -= 1;
                        self.start_if_ready(user, &mut commands);
                    }
                }
            }
            Event::Failed(vertex) => {
                self.end(vertex);
                self.stop(&mut commands);
            }
            Event::Interrupt => self.stop(&mut commands),
        }
        if self.running == 0 {
            commands.push(Command::Finish);
        }
        commands
    }

    fn start_if_ready(&mut self, vertex: VertexId, commands: &mut Vec<Command>) {
        if self.states[vertex.0] == State::Waiting(0) && !self.stopping {
            self.states[vertex.0] = State::Running;
            self.running += 1;
            commands.push(Command::Start(vertex));
        }
    }

    fn end(&mut self, vertex: VertexId) {
        debug_assert_eq!(self.states[vertex.0], State::Running, "only what runs can end");
        self.states[vertex.0] = State::Ended;
        self.running -= 1;
    }

    fn stop(&mut self, commands: &mut Vec<Command>) {
        if self.stopping {
            return;
        }
        self.stopping = true;
        commands.push(Command::Stop);
        for (at, state) in self.states.iter_mut().enumerate() {
            if matches!(state, State::Waiting(_)) {
                *state = State::Ended;
                commands.push(Command::Cancelled(VertexId(at)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nacre_frontend::image_config::ImageConfig;
    use nacre_frontend::llb::{Image, MkdirOp, Op, Platform, Vertex};

    /// A graph by the inputs of each vertex.
    fn graph(inputs: &[&[usize]]) -> Definition {
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() };
        let vertex = |inputs: &&[usize]| Vertex {
            op: Op::Mkdir(MkdirOp { path: "/".into(), user: String::new() }),
            inputs: inputs.iter().map(|&at| Some(VertexId(at))).collect(),
            name: String::new(),
            stage: String::new(),
            text: String::new(),
            lines: None,
            platform: platform.clone(),
            ignore_cache: false,
        };
        let image = Image { top: None, config: ImageConfig::default(), platform: platform.clone() };
        Definition { vertices: inputs.iter().map(vertex).collect(), image }
    }

    fn start(at: usize) -> Command {
        Command::Start(VertexId(at))
    }

    #[test]
    fn independent_vertices_start_together() {
        let mut schedule = Schedule::new(&graph(&[&[], &[], &[0], &[1, 1], &[2, 3]]));
        assert_eq!(schedule.step(Event::Begin), [start(0), start(1)]);
        assert_eq!(schedule.step(Event::Done(VertexId(1))), [start(3)]);
        assert_eq!(schedule.step(Event::Done(VertexId(0))), [start(2)]);
        assert_eq!(schedule.step(Event::Done(VertexId(3))), []);
        assert_eq!(schedule.step(Event::Done(VertexId(2))), [start(4)]);
        assert_eq!(schedule.step(Event::Done(VertexId(4))), [Command::Finish]);
    }

    #[test]
    fn a_failure_stops_what_runs_and_cancels_the_rest() {
        let mut schedule = Schedule::new(&graph(&[&[], &[], &[0]]));
        schedule.step(Event::Begin);
        assert_eq!(schedule.step(Event::Failed(VertexId(0))), [Command::Stop, Command::Cancelled(VertexId(2))]);
        assert_eq!(schedule.step(Event::Interrupt), []);
        assert_eq!(schedule.step(Event::Done(VertexId(1))), [Command::Finish]);
    }

    #[test]
    fn nothing_to_do_finishes_at_once() {
        assert_eq!(Schedule::new(&graph(&[])).step(Event::Begin), [Command::Finish]);
    }
}
