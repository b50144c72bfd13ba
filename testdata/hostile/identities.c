/* Ways in which real programs change their ids: with capabilities kept (setpriv, dbus-daemon), and with memory that others
   may not read (sudo, ssh-agent). Says what the kernel answered. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
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
    say("capset", raise_all());
    say("setresgid", setresgid(22, 22, 22));
    say("setgroups", setgroups(1, &group));
    say("chown", chown("/kept", 23, 24));
    if (fork() == 0) {
        say("give up", lower_all());
        say("setresgid without", setresgid(26, 26, 26));
        _exit(0);
    }
    wait(0);
    execl(self, self, "after", (char *)0);
    _exit(1);
}

int main(int count, char **arguments)
{
    if (count > 1) {
        gid_t group = 25;
        say("setgroups after exec", setgroups(1, &group));
        say("setuid after exec", setuid(0));
        say("create", close(open("/tmp/of-21", O_CREAT | O_WRONLY, 0640)));
        return 0;
    }
    close(open("/kept", O_CREAT | O_WRONLY, 0600));
    if (fork() == 0) {
        undumpable();
        _exit(0);
    }
    wait(0);
    if (fork() == 0)
        keeping(arguments[0]);
    wait(0);
    show("/kept", AT_FDCWD);
    show("/tmp/of-21", AT_FDCWD);
    return 0;
}
