// Looks for files of the kernel that can be written, and for mounts on which devices work. Prints ESCAPED for each.
#define _GNU_SOURCE
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
static int seen;
static int look(const char *path, const struct stat *stat, int type, struct FTW *at) {
    // Those of processes are the step's own, and pressure files are for whoever wants to be told.
    if (!strncmp(path, "/proc/", 6) && path[6] >= '0' && path[6] <= '9') return FTW_SKIP_SUBTREE;
    if (!strncmp(path, "/proc/pressure", 14)) return FTW_SKIP_SUBTREE;
    // Nothing takes what is written to it: mm/slab_common.c has no function for that any more.
    if (!strcmp(path, "/proc/slabinfo")) return FTW_CONTINUE;
    seen++;
    if (S_ISREG(stat->st_mode) && stat->st_mode & 0222) {
        int file = open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY);
        if (file >= 0) { printf("ESCAPED %s can be written\n", path); close(file); }
    }
    if (S_ISBLK(stat->st_mode)) printf("ESCAPED the disk %s\n", path);
    return FTW_CONTINUE;
}
int main(void) {
    nftw("/proc", look, 40, FTW_PHYS | FTW_ACTIONRETVAL);
    nftw("/sys", look, 40, FTW_PHYS | FTW_ACTIONRETVAL);
    nftw("/dev", look, 40, FTW_PHYS | FTW_ACTIONRETVAL);
    if (seen < 100) printf("ESCAPED nothing was looked at\n");
    FILE *mounts = fopen("/proc/self/mountinfo", "r");
    char line[8192], target[4096], options[4096];
    int count = 0;
    while (fgets(line, sizeof line, mounts)) {
        if (sscanf(line, "%*s %*s %*s %*s %4095s %4095s", target, options) != 2) continue;
        count++;
        struct stat stat;
        int device = lstat(target, &stat) == 0 && S_ISCHR(stat.st_mode);
        // Single devices are bound; what is a terminal is devpts, which makes its own and no others.
        if (device) {
            unsigned major = major(stat.st_rdev), minor = minor(stat.st_rdev);
            int harmless = major == 1 && (minor == 3 || minor == 5 || minor == 7 || minor == 8 || minor == 9)
                || major == 5 && minor == 0;
            if (!harmless) printf("ESCAPED the device %s\n", target);
        } else if (!strstr(options, "nodev") && strcmp(target, "/dev/pts")) {
            printf("ESCAPED devices on %s: %s\n", target, options);
        }
        if (!strcmp(target, "/proc/sys") && !strstr(options, "ro")) printf("ESCAPED /proc/sys\n");
    }
    if (count < 15) printf("ESCAPED only %d mounts\n", count);
    printf("all was tried\n");
    return 0;
}
