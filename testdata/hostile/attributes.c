// Sets attributes of files that images may hold, and says what the kernel answers.
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>
static void say(const char *what, int result) { printf("%s %s\n", what, result ? strerror(errno) : "ok"); }
static void make(const char *path) { close(open(path, O_CREAT | O_WRONLY, 0644)); chmod(path, 0644); }
int main(int count, char **args) {
    struct { uint32_t magic, permitted, inheritable, more[2]; } bind = {0x02000001, 1 << 10, 0, {0, 0}}, found;
    struct { uint32_t version; struct { uint16_t tag, permissions; uint32_t id; } entries[5]; } list =
        {2, {{1, 6, -1}, {2, 6, count > 1 ? atoi(args[1]) : 0}, {4, 4, -1}, {0x10, 6, -1}, {0x20, 4, -1}}};
    make("/cap"), make("/owned"), make("/suid"), make("/list"), make("/note");
    say("capability", setxattr("/cap", "security.capability", &bind, sizeof bind, 0));
    say("read", getxattr("/cap", "security.capability", &found, sizeof found) != sizeof found || found.permitted != 1 << 10);
    // A change of owner takes it away.
    say("capability", setxattr("/owned", "security.capability", &bind, sizeof bind, 0));
    say("owner", chown("/owned", 5, 6));
    say("gone", getxattr("/owned", "security.capability", &found, sizeof found) >= 0);
    say("set-id", chmod("/suid", 06755));
    say("list", setxattr("/list", "system.posix_acl_access", &list, sizeof list, 0));
    say("note", setxattr("/note", "user.note", "kept?", 5, 0));
    return 0;
}
