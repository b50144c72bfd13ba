/* A program like ping: started with a path, it copies itself there with CAP_NET_RAW as the file's capability; started without,
   it opens a raw socket. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

int main(int count, char **arguments)
{
    struct { uint32_t magic, permitted, inheritable, more[2]; } raw = { 0x02000001, 1 << 13, 0, { 0, 0 } };
    char buffer[65536];
    ssize_t length;
    if (count == 1) {
        printf("raw socket: %s\n", socket(AF_INET, SOCK_RAW, IPPROTO_ICMP) < 0 ? strerror(errno) : "ok");
        return 0;
    }
    int from = open("/proc/self/exe", O_RDONLY), to = open(arguments[1], O_CREAT | O_WRONLY, 0755);
    while ((length = read(from, buffer, sizeof buffer)) > 0)
        if (write(to, buffer, length) != length)
            return 1;
    close(to);
    chmod(arguments[1], 0755);
    if (setxattr(arguments[1], "security.capability", &raw, sizeof raw, 0) != 0) {
        perror("setxattr");
        return 1;
    }
    return 0;
}
