// Calls by other ways than the machine's usual one: i386's int 0x80, x32's numbers, a tracer that changes them, a filter
// of the step's own; and rights that have no command. Prints ESCAPED for what must not work.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <stdlib.h>
#include <unistd.h>
static void try(const char *name, long result) { if (result >= 0) printf("ESCAPED %s\n", name); }
static void check(const char *name, int wrong) { if (wrong) printf("ESCAPED %s\n", name); }

// i386 passes 32-bit addresses.
static char *low;
static char *text(const char *value) {
    static int used;
    char *place = strcpy(low + used, value);
    used += strlen(value) + 1;
    return place;
}
static long old(long number, long a, long b, long c, long d, long e) {
    long result;
    asm volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
                 : "memory", "r8", "r9", "r10", "r11");
    return (int)result;
}
static void thirty_two_bits(void) {
    low = mmap((void *)0x10000000, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    char *none = text("none"), *tmp = text("/tmp"), *tmpfs = text("tmpfs"), *root = text("/");
    long pid = old(20, 0, 0, 0, 0, 0);
    if (pid == -ENOSYS) return; // The kernel has no such calls at all.
    check("i386 getpid", pid != getpid());
    try("i386 mount", old(21, (long)none, (long)tmp, (long)tmpfs, 0, 0));
    try("i386 umount2", old(52, (long)text("/proc/sys"), 2, 0, 0, 0));
    try("i386 pivot_root", old(217, (long)root, (long)root, 0, 0, 0));
    try("i386 unshare", old(310, CLONE_NEWUSER, 0, 0, 0, 0));
    try("i386 clone", old(120, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0));
    try("i386 setns", old(346, 0, 0, 0, 0, 0));
    try("i386 keyctl", old(288, 0, -3, 1, 0, 0));
    try("i386 add_key", old(286, (long)text("user"), (long)text("x"), (long)text("y"), 1, -3));
    try("i386 bpf", old(357, 0, (long)low + 4096, 64, 0, 0));
    try("i386 perf", old(336, (long)low + 4096, 0, -1, -1, 0));
    try("i386 io_uring", old(425, 4, (long)low + 4096, 0, 0, 0));
    try("i386 open_by_handle_at", old(342, -100, (long)low + 4096, 0, 0, 0));
    try("i386 init_module", old(128, (long)low + 4096, 64, (long)low, 0, 0));
    try("i386 stime", old(25, (long)low + 4096, 0, 0, 0, 0));
    try("i386 vm86", old(166, 0, 0, 0, 0, 0));
    try("i386 fsopen", old(430, (long)tmpfs, 0, 0, 0, 0));
    unsigned *args = (unsigned *)(low + 8192);
    args[0] = AF_PACKET, args[1] = SOCK_RAW, args[2] = 0;
    long packets = old(102, 1, (long)args, 0, 0, 0);
    // Of a network that the step has for itself, everything may be received.
    if (getenv("SHARED")) try("i386 packet socket", packets);
    // Owners are the same by every way.
    close(open("/foreign", O_CREAT | O_WRONLY, 0600));
    struct stat st;
    if (getuid() == 0) {
        check("i386 chown", old(212, (long)text("/foreign"), 70, 71, 0, 0) != 0 || stat("/foreign", &st) || st.st_uid != 70);
        check("i386 lchown16", old(16, (long)text("/foreign"), 72, -1, 0, 0) != 0 || stat("/foreign", &st) || st.st_uid != 72
              || st.st_gid != 71);
    }
    check("i386 getuid", old(199, 0, 0, 0, 0, 0) != getuid() || old(24, 0, 0, 0, 0, 0) != getuid());
}
static void x32(void) {
    const int bit = 0x40000000;
    try("x32 getpid", syscall(bit + SYS_getpid));
    try("x32 mount", syscall(bit + SYS_mount, "none", "/tmp", "tmpfs", 0, 0));
    try("x32 chown", syscall(bit + SYS_chown, "/", 9, 9));
    try("x32 unshare", syscall(bit + SYS_unshare, CLONE_NEWUSER));
    try("x32 ptrace", syscall(bit + 521, PTRACE_TRACEME, 0, 0, 0));
    try("x32 execve", syscall(bit + 520, "/bin/true", 0, 0));
}
// A tracer puts another call in the place of a harmless one, after the filter could have looked at it.
static void traced(void) {
    const struct { const char *name; long number; int error; } calls[] = {
        {"unshare", SYS_unshare, EPERM}, {"mount", SYS_mount, EPERM}, {"io_uring", SYS_io_uring_setup, ENOSYS},
        {"keyctl", SYS_keyctl, EPERM}, {"bpf", SYS_bpf, EPERM}, {"x32", 0x40000000 + SYS_unshare, ENOSYS}};
    for (int i = 0; i < sizeof calls / sizeof *calls; i++) {
        pid_t child = fork();
        if (child == 0) {
            ptrace(PTRACE_TRACEME, 0, 0, 0);
            raise(SIGSTOP);
            errno = 0;
            long result = syscall(SYS_getppid, CLONE_NEWUSER, 0, 0, 0, 0);
            _exit(result == -1 ? errno : 255);
        }
        int status, done = 0;
        waitpid(child, &status, 0);
        if (!WIFSTOPPED(status)) { check("ptrace of a child", 1); continue; }
        ptrace(PTRACE_SETOPTIONS, child, 0, PTRACE_O_TRACESYSGOOD);
        for (;;) {
            ptrace(PTRACE_SYSCALL, child, 0, 0);
            waitpid(child, &status, 0);
            if (!WIFSTOPPED(status)) break;
            struct user_regs_struct regs;
            ptrace(PTRACE_GETREGS, child, 0, &regs);
            if (WSTOPSIG(status) == (SIGTRAP | 0x80) && !done && regs.orig_rax == SYS_getppid) {
                regs.orig_rax = calls[i].number;
                ptrace(PTRACE_SETREGS, child, 0, &regs);
                done = 1;
            }
        }
        char name[64];
        snprintf(name, sizeof name, "%s by a tracer: %d", calls[i].name, WEXITSTATUS(status));
        check(name, !done || WEXITSTATUS(status) != calls[i].error);
    }
}
// Whoever started the step, by the numbers that it can guess.
static void parents(void) {
    pid_t parent = getppid(), first = 1;
    char page[64] = {0};
    struct iovec own = {page, 64}, other = {(void *)0x400000, 64};
    check("the parent is visible", parent != 0 && getpid() == 1);
    for (pid_t pid = 2; pid < 40000; pid += pid < 200 ? 1 : 97) {
        if (pid == getpid() || kill(pid, 0) != 0) continue;
        char name[64];
        snprintf(name, sizeof name, "process %d", pid);
        try(name, 0);
    }
    try("ptrace of nobody", ptrace(PTRACE_ATTACH, 0, 0, 0));
    try("memory of nobody", process_vm_readv(0, &own, 1, &other, 1, 0));
    check("limits of nobody", syscall(SYS_prlimit64, 100000, RLIMIT_NOFILE, 0, page) == 0);
    try("pidfd_getfd", syscall(438, syscall(434, first, 0), 0, 0));
    try("kcmp", syscall(SYS_kcmp, 1, 1, 0, 0, 0));
    int map = open("/proc/1/uid_map", O_WRONLY);
    try("uid_map", map < 0 ? -1 : write(map, "0 0 10", 6));
}
static void rights(void) {
    char page[4096] = {0};
    struct sched_param most = {.sched_priority = 50};
    try("real time", sched_setscheduler(0, SCHED_FIFO, &most));
    try("real-time input and output", syscall(SYS_ioprio_set, 1, 0, 1 << 13));
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_max += 1;
    try("a higher limit", setrlimit(RLIMIT_NOFILE, &files));
    try("prctl(PR_SET_MM)", prctl(PR_SET_MM, PR_SET_MM_START_BRK, 0x10000, 0, 0));
    try("PR_CAPBSET_DROP of nothing known", prctl(PR_CAPBSET_DROP, 63, 0, 0, 0));
    try("ambient capabilities", prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 21, 0, 0));
    try("syslog", syscall(SYS_syslog, 3, page, sizeof page));
    try("personality without randomness", syscall(SYS_personality, 0x0040000));
    try("process_madvise", syscall(440, -1, 0, 0, 0, 0));
    try("listmount", syscall(458, page, page, 16, 0));
    try("open_tree_attr", syscall(467, AT_FDCWD, "/", 1, page, 32));
    try("nfsservctl", syscall(180, 0, 0, 0));
    try("vsock", socket(AF_VSOCK, SOCK_STREAM, 0));
    if (getenv("SHARED")) {
        try("all packets", socket(AF_PACKET, SOCK_RAW, 0));
        try("all of TCP", socket(AF_INET, SOCK_RAW, IPPROTO_TCP));
        try("all of UDP", socket(AF_INET6, SOCK_RAW, IPPROTO_UDP));
    }
    int key = atoi(getenv("SHM_KEY"));
    check("shared memory of the host", key == 0 || shmget(key, 0, 0) >= 0);
    // The host listens here.
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int length = snprintf(name.sun_path + 1, 100, "%s", getenv("ABSTRACT")) + 1;
    int connection = socket(AF_UNIX, SOCK_STREAM, 0);
    int connected = connect(connection, (void *)&name, offsetof(struct sockaddr_un, sun_path) + length) == 0;
    // On the host's network they are reachable, as the documents say.
    check("abstract sockets", connected != (getenv("SHARED") != 0));
}
// A filter of its own cannot take calls away from the step's filter, only refuse more.
static void own_filter(void) {
    struct sock_filter allow[] = {{BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW}};
    struct sock_fprog all = {1, allow};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    check("a filter of its own", syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &all) != 0);
    try("unshare behind it", unshare(CLONE_NEWUSER));
    struct sock_filter ask[] = {{BPF_RET | BPF_K, 0, 0, 0x7fc00000}};
    struct sock_fprog every = {1, ask};
    // Where the supervisor listens, nobody else can.
    if (getenv("EMULATED")) try("a listener of its own", syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 8, &every));
}
int main(void) {
    thirty_two_bits();
    x32();
    traced();
    parents();
    rights();
    own_filter();
    printf("all was tried\n");
    return 0;
}
