/* Ways in which real programs change their ids: with capabilities kept (setpriv, dbus-daemon), and with memory that others
   may not read (sudo, ssh-agent). Says what the kernel answered. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void say(const char *what, long result)
{
    printf("%s: %s\n", what, result < 0 ? strerror(errno) : "ok");
    fflush(stdout);
}

static void show(const char *name, int dir)
{
    struct stat stat;
    if (fstatat(dir, name, &stat, *name ? AT_SYMLINK_NOFOLLOW : AT_EMPTY_PATH) != 0) {
        printf("%s: %s\n", name, strerror(errno));
        return;
    }
    printf("%s belongs to %d:%d\n", *name ? name : "descriptor", stat.st_uid, stat.st_gid);
    fflush(stdout);
}

static long raise_all(void)
{
    struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) != 0)
        return -1;
    data[0].effective = data[0].permitted;
    data[1].effective = data[1].permitted;
    return syscall(SYS_capset, &header, data);
}

static long lower_all(void)
{
    struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct data[2];
    memset(data, 0, sizeof data);
    return syscall(SYS_capset, &header, data);
}

static long lower(int capability)
{
    struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct data[2];
    if (syscall(SYS_capget, &header, data) != 0)
        return -1;
    data[0].effective &= ~(1U << capability);
    return syscall(SYS_capset, &header, data);
}

static void undumpable(void)
{
    gid_t groups[2] = { 5, 6 };
    uid_t ids[3];
    int dir;
    say("undumpable", prctl(PR_SET_DUMPABLE, 0));
    say("mkdir", mkdir("/hidden", 0755));
    say("chdir", chdir("/hidden"));
    dir = open(".", O_RDONLY | O_DIRECTORY);
    close(open("relative", O_CREAT | O_WRONLY, 0600));
    say("chown relative", chown("relative", 7, 8));
    say("chown by descriptor", fchownat(dir, "relative", -1, 9, 0));
    show("relative", AT_FDCWD);
    show("relative", dir);
    say("fchown", fchown(dir, 10, 11));
    show("", dir);
    say("setgroups", setgroups(2, groups));
    say("getgroups", getgroups(2, groups));
    printf("groups %d %d\n", groups[0], groups[1]);
    say("setresgid", setresgid(12, 12, 12));
    say("setresuid", setresuid(13, 14, 13));
    say("getresuid", getresuid(ids, ids + 1, ids + 2));
    printf("ids %d %d %d\n", ids[0], ids[1], ids[2]);
    fflush(stdout);
}

static void keeping(const char *self)
{
    gid_t group = 22;
    say("keep", prctl(PR_SET_KEEPCAPS, 1));
    say("setresuid", setresuid(21, 21, 21));
    say("setuid too early", setuid(0));
    say("chown too early", chown("/kept", 23, 24));
    say("capset", raise_all());
    say("setresgid", setresgid(22, 22, 22));
    say("setgroups", setgroups(1, &group));
    say("chown", chown("/kept", 23, 24));
    if (fork() == 0) {
        say("give up", lower_all());
        say("setresgid without", setresgid(26, 26, 26));
        say("chown without", chown("/kept", 27, 27));
        say("chroot without", chroot("/tmp"));
        say("mknod without", mknod("/tmp/null", S_IFCHR | 0666, 0x103));
        _exit(0);
    }
    wait(0);
    execl(self, self, "after", (char *)0);
    _exit(1);
}

static long ask_for(int capability)
{
    struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct data[2];
    memset(data, 0, sizeof data);
    data[0].permitted = data[0].effective = 1U << capability;
    return syscall(SYS_capset, &header, data);
}

static void *lower_in_thread(void *unused)
{
    (void)unused;
    say("lower in a thread", lower_all());
    return 0;
}

/* What changes nothing: refused by the kernel, or of another thread. */
static void unchanged(void)
{
    struct __user_cap_header_struct header = { 0, 0 };
    struct stat stat;
    pthread_t thread;
    say("ask for more", ask_for(CAP_SYS_TIME));
    say("chown after asking", chown("/kept", 0, 0));
    say("version", syscall(SYS_capset, &header, 0));
    printf("version %s\n", header.version == _LINUX_CAPABILITY_VERSION_3 ? "3" : "unknown");
    fflush(stdout);
    say("no such capability", prctl(PR_CAPBSET_DROP, 1UL << 32, 0, 0, 0));
    if (pthread_create(&thread, 0, lower_in_thread, 0) != 0)
        _exit(1);
    pthread_join(thread, 0);
    say("chown beside the thread", chown("/kept", 0, 0));
    printf("own program: %s\n", lstat("/proc/self/exe", &stat) == 0 && S_ISLNK(stat.st_mode) ? "a link" : "no link");
    fflush(stdout);
}

/* Root without some of its capabilities. */
static void lowered(void)
{
    say("lower", lower(CAP_CHOWN));
    say("root's chown", chown("/kept", 28, 28));
    say("root's setgid", setgid(0));
    say("raise", raise_all());
    say("chown again", chown("/kept", 0, 0));
    say("drop", prctl(PR_CAPBSET_DROP, CAP_SETGID));
    say("setgid yet", setgid(29));
    if (fork() == 0) {
        say("setuid", setuid(30));
        say("drop as a user", prctl(PR_CAPBSET_DROP, CAP_SETGID));
        _exit(0);
    }
    wait(0);
    execl("/proc/self/exe", "identities", "dropped", (char *)0);
    _exit(1);
}

/* What a program that may be set-id is, and whose what it makes is. */
static void make(const char *name)
{
    uid_t users[3], groups[3];
    getresuid(users, users + 1, users + 2);
    getresgid(groups, groups + 1, groups + 2);
    printf("%s: %d %d %d, %d %d %d\n", name, users[0], users[1], users[2], groups[0], groups[1], groups[2]);
    fflush(stdout);
    close(open(name, O_CREAT | O_WRONLY, 0640));
    show(name, AT_FDCWD);
}

int main(int count, char **arguments)
{
    const char *what = count > 1 ? arguments[1] : "";
    if (strcmp(what, "promise") == 0) {
        say("promise", prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
        execl(arguments[2], arguments[2], arguments[3], (char *)0);
        return 1;
    } else if (strcmp(what, "dropped") == 0) {
        say("setgid after drop", setgid(31));
        say("setuid after drop", setuid(32));
    } else if (strcmp(what, "after") == 0) {
        gid_t group = 25;
        say("setgroups after exec", setgroups(1, &group));
        say("setuid after exec", setuid(0));
        say("create", close(open("/tmp/of-21", O_CREAT | O_WRONLY, 0640)));
    } else if (count > 1) {
        make(what);
    } else {
        close(open("/kept", O_CREAT | O_WRONLY, 0600));
        if (fork() == 0) {
            undumpable();
            _exit(0);
        }
        wait(0);
        if (fork() == 0) {
            unchanged();
            _exit(0);
        }
        wait(0);
        if (fork() == 0)
            lowered();
        wait(0);
        if (fork() == 0)
            keeping(arguments[0]);
        wait(0);
        show("/kept", AT_FDCWD);
        show("/tmp/of-21", AT_FDCWD);
    }
    return 0;
}
