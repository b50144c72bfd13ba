//! `nacre doctor`: what the kernel allows here, what that means for builds, and what helps.

use crate::build_command::failure;
use crate::cli::{DoctorArgs, ListFormat};
use crate::report::{CommandError, Exit};
use crate::request::{Environment, Surroundings};
use nacre_solver::sandbox::{self, Probe, Right, Verdict};
use serde_json::json;
use std::path::Path;

/// A right in words: what it is, and what is without it.
fn words(right: Right) -> (&'static str, &'static str) {
    match right {
        Right::UserNamespace => (
            "user namespace",
            "RUN steps cannot work; Dockerfiles without RUN build all the same, and so does `COPY --from`",
        ),
        Right::ManyIds => ("many ids", "owners and users of RUN steps are emulated: same layers, a little slower"),
        Right::Overlay => ("overlay on the store", "RUN steps work on copies, which takes time"),
        Right::FreshProc => ("fresh /proc", "steps see the processes of this container"),
        Right::NetworkNamespace => ("network namespace", "--network=none does not work"),
        Right::Seccomp => ("system call filter", "RUN steps cannot work but with --security=insecure"),
        Right::Notification => (
            "system call notification",
            "owners cannot be emulated and device nodes not made: RUN steps work only as root",
        ),
        Right::Chroot => ("chroot", "--isolation=chroot does not work, which is only needed where namespaces do not"),
        Right::Tun => ("tun device", "--network=pasta does not work"),
        Right::Limits => ("limits of steps", "--memory, --cpu-quota and the other limits end the build with an error"),
    }
}

/// What helps against a refusal, for each place; `None` when the reason says it itself.
fn cure(right: Right, place: Surroundings, reason: &str) -> Option<&'static str> {
    if ["sysctl ", "usermod ", "chroot"].iter().any(|word| reason.contains(word)) {
        return None;
    }
    Some(match (right, place) {
        (Right::UserNamespace | Right::Seccomp | Right::Notification, Surroundings::Docker) => {
            "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt \
             systempaths=unconfined …"
        }
        (Right::UserNamespace | Right::Seccomp | Right::Notification, Surroundings::Podman) => {
            "podman run --security-opt seccomp=unconfined --security-opt unmask=ALL …"
        }
        (Right::UserNamespace | Right::Seccomp | Right::Notification, Surroundings::Kubernetes) => {
            "in the container's securityContext: seccompProfile: {type: Unconfined}, procMount: Unmasked (with \
             hostUsers: false in the pod's spec)"
        }
        (Right::UserNamespace | Right::Seccomp | Right::Notification, Surroundings::GitLab) => {
            "in the runner's config.toml: [runners.docker] security_opt = [\"seccomp:unconfined\", \
             \"apparmor:unconfined\", \"systempaths=unconfined\"]; with the kubernetes executor, a seccompProfile of \
             type Unconfined in [runners.kubernetes.build_container_security_context]"
        }
        (Right::UserNamespace, Surroundings::GitHub) => {
            "without `container:` in the job: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; with it: \
             container.options: --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt \
             systempaths=unconfined"
        }
        (Right::Seccomp | Right::Notification, Surroundings::GitHub) => {
            "container.options: --security-opt seccomp=unconfined"
        }
        (Right::UserNamespace, Surroundings::Machine) => {
            "sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=15000 \
             kernel.apparmor_restrict_unprivileged_userns=0, those of them that exist"
        }
        (Right::Seccomp | Right::Notification, Surroundings::Machine) => {
            "a kernel of 5.14 or later, with CONFIG_SECCOMP_FILTER"
        }
        (Right::FreshProc, Surroundings::Docker | Surroundings::GitHub) => "--security-opt systempaths=unconfined",
        (Right::FreshProc, Surroundings::Podman) => "--security-opt unmask=ALL",
        (Right::FreshProc, Surroundings::Kubernetes) => {
            "procMount: Unmasked in the container's securityContext, with hostUsers: false"
        }
        (Right::FreshProc, Surroundings::GitLab) => {
            "in the runner's config.toml: [runners.docker] security_opt = [\"systempaths=unconfined\"]"
        }
        (Right::FreshProc, Surroundings::Machine) => "nothing may be mounted over parts of /proc",
        (Right::Overlay, _) => {
            "--store or NACRE_STORE on a local disk, a volume or a tmpfs: not on another overlay (the root of a \
             container) and not on NFS"
        }
        (Right::NetworkNamespace, _) => "sysctl -w user.max_net_namespaces=15000",
        (Right::Limits, Surroundings::Docker) => {
            "docker run --memory … --cpus … limits the build as a whole; for limits of single steps: docker run --privileged \
             --cgroupns=private …"
        }
        (Right::Limits, Surroundings::Podman) => {
            "podman run --memory … --cpus … limits the build as a whole; for limits of single steps: podman run \
             --cgroupns=private --security-opt unmask=ALL …"
        }
        (Right::Limits, Surroundings::Kubernetes) => {
            "resources: {limits: {memory: …, cpu: …}} in the container limits the build as a whole"
        }
        (Right::Limits, Surroundings::GitLab) => {
            "in the runner's config.toml: memory and cpus in [runners.docker], or memory_limit and cpu_limit in \
             [runners.kubernetes], limit the job as a whole"
        }
        (Right::Limits, Surroundings::GitHub) => {
            "without `container:` in the job: sudo systemd-run --scope -p Delegate=yes --uid=$USER nacre build …; with it: \
             container.options: --memory … --cpus … limits the job as a whole"
        }
        (Right::Limits, Surroundings::Machine) => {
            "systemd-run --user --scope -p Delegate=yes nacre build … (as root without --user), on a machine with control \
             groups of version 2 alone (systemd.unified_cgroup_hierarchy=1)"
        }
        (Right::Chroot, Surroundings::Docker) => "docker run --user 0 …, without --cap-drop",
        (Right::Chroot, Surroundings::Podman) => "podman run --user 0 --cap-add SYS_CHROOT,MKNOD …",
        (Right::Chroot, Surroundings::Kubernetes) => {
            "in the container's securityContext: runAsUser: 0, capabilities: {add: [SYS_CHROOT, MKNOD]}"
        }
        (Right::Chroot, Surroundings::GitLab) => {
            "an image whose user is root, or user = \"root\" in [runners.docker] of the runner's config.toml"
        }
        (Right::Chroot, Surroundings::GitHub) => "container.options: --user 0",
        (Right::Chroot, Surroundings::Machine) => "sudo",
        (Right::Tun, Surroundings::Docker) => "docker run --device /dev/net/tun …",
        (Right::Tun, Surroundings::Podman) => "podman run --device /dev/net/tun …",
        (Right::Tun, Surroundings::Kubernetes) => {
            "a device plugin that gives the container /dev/net/tun, which a hostPath volume alone does not"
        }
        (Right::Tun, Surroundings::GitLab) => {
            "in the runner's config.toml: [runners.docker] devices = [\"/dev/net/tun\"]"
        }
        (Right::Tun, Surroundings::GitHub) => {
            "without `container:` in the job: sudo chmod 666 /dev/net/tun; with it: container.options: --device /dev/net/tun"
        }
        (Right::Tun, Surroundings::Machine) => "as root: modprobe tun && chmod 666 /dev/net/tun",
        (Right::ManyIds, _) => {
            "as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER, and install newuidmap (package \
             uidmap or shadow-utils); only for speed"
        }
    })
}

/// Tries everything and prints it.
pub(crate) fn run(args: &DoctorArgs, env: &Environment) -> Result<(), CommandError> {
    let store = env.store(args.at.store.as_deref())?;
    // What will be the store's file system.
    let dir = store.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    let probe = sandbox::probe(dir).map_err(|error| CommandError::new(Exit::Host, &error, None))?;
    let place = env.surroundings();
    let text = match args.format {
        ListFormat::Table => table(&probe, place),
        ListFormat::Json => json_text(&probe, place, dir),
    };
    crate::print_result(&text)?;
    let works = |right: &Right| *probe.verdict(*right) == Verdict::Works;
    let help = works(&Right::Chroot).then(|| "--isolation=chroot runs them with less protection".to_owned());
    match has_namespaces(&probe) {
        true => Ok(()),
        false => Err(failure(Exit::Host, "RUN steps cannot work here", help)),
    }
}

/// Whether steps can run in namespaces; without overlayfs they work on copies.
fn has_namespaces(probe: &Probe) -> bool {
    [Right::UserNamespace, Right::Seccomp].iter().all(|right| *probe.verdict(*right) == Verdict::Works)
}

/// One line: what builds do here with what they may.
fn chosen(probe: &Probe) -> &'static str {
    let works = |right| *probe.verdict(right) == Verdict::Works;
    match (has_namespaces(probe), works(Right::FreshProc), works(Right::Overlay)) {
        (true, true, true) => "RUN steps have namespaces, and a /proc of their own",
        (true, true, false) => {
            "RUN steps have namespaces, and a /proc of their own; they work on copies, which takes time"
        }
        (true, false, true) => "RUN steps have namespaces, but see the processes of this container",
        (true, false, false) => {
            "RUN steps have namespaces, but see the processes of this container, and work on copies"
        }
        (false, ..) if works(Right::Chroot) => {
            "RUN steps need --isolation=chroot, which does not keep them from what runs here; Dockerfiles without RUN build"
        }
        (false, ..) => "RUN steps cannot work; Dockerfiles without RUN build",
    }
}

fn table(probe: &Probe, place: Surroundings) -> String {
    let mut text = String::new();
    for (right, verdict) in &probe.tries {
        let (name, without) = words(*right);
        match verdict {
            Verdict::Works => text.push_str(&format!("works    {name}\n")),
            Verdict::NotTried => text.push_str(&format!("unknown  {name}: it needs what is refused above\n")),
            Verdict::Refused(reason) => {
                text.push_str(&format!("refused  {name}: {reason}\n         without it: {without}\n"));
                if let Some(cure) = cure(*right, place, reason) {
                    text.push_str(&format!("         what helps: {cure}\n"));
                }
            }
        }
    }
    text.push_str(&format!("so: {}\n", chosen(probe)));
    text
}

fn json_text(probe: &Probe, place: Surroundings, dir: &Path) -> String {
    let entry = |(right, verdict): &(Right, Verdict)| {
        let (name, without) = words(*right);
        let (state, reason) = match verdict {
            Verdict::Works => ("works", None),
            Verdict::Refused(reason) => ("refused", Some(reason)),
            Verdict::NotTried => ("unknown", None),
        };
        let cure = reason.and_then(|reason| cure(*right, place, reason));
        json!({"right": right, "name": name, "state": state, "reason": reason, "without": without, "cure": cure})
    };
    let rights: Vec<_> = probe.tries.iter().map(entry).collect();
    format!(
        "{:#}\n",
        json!({"surroundings": format!("{place:?}").to_lowercase(), "store": dir.display().to_string(), "isolation": has_namespaces(probe).then_some("userns"), "chosen": chosen(probe), "rights": rights})
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_words_and_a_cure() {
        let places = [
            Surroundings::GitLab,
            Surroundings::GitHub,
            Surroundings::Kubernetes,
            Surroundings::Podman,
            Surroundings::Docker,
            Surroundings::Machine,
        ];
        let rights = [
            Right::UserNamespace,
            Right::ManyIds,
            Right::Overlay,
            Right::FreshProc,
            Right::NetworkNamespace,
            Right::Seccomp,
            Right::Notification,
            Right::Tun,
            Right::Limits,
            Right::Chroot,
        ];
        for place in places {
            let refused = |right: &Right| (*right, Verdict::Refused("why".to_owned()));
            let text = table(&Probe { tries: rights.iter().map(refused).collect() }, place);
            assert_eq!(text.matches("what helps: ").count(), rights.len(), "{place:?}: {text}");
            assert_eq!(text.matches("without it: ").count(), rights.len(), "{place:?}: {text}");
        }
        assert_eq!(cure(Right::UserNamespace, Surroundings::Docker, "allow some with: sysctl -w x=1"), None);
        let works = Probe { tries: vec![(Right::Overlay, Verdict::Works), (Right::Seccomp, Verdict::NotTried)] };
        let expected = "works    overlay on the store\nunknown  system call filter: it needs what is refused above\n\
                        so: RUN steps cannot work; Dockerfiles without RUN build\n";
        assert_eq!(table(&works, Surroundings::Machine), expected);
    }
}
