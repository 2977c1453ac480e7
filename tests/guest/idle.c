/*
 * An agent that waits: it holds one open request to agentd and nothing else. Without a library, so that what an idle
 * agent costs is the kernel's and the jail's memory, and a thousand packages are small.
 *
 *     gcc -static -nostdlib -fno-stack-protector -Os -o idle idle.c
 */
#include <asm/unistd.h>

struct address {
    unsigned short family, port;
    unsigned int host;
    char zero[8];
};

static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

static const char request[] =
    "GET /agent/v1/messages/next?wait_s=3600 HTTP/1.1\r\nhost: 127.0.0.1:7070\r\n\r\n";

__attribute__((force_align_arg_pointer, noreturn)) void _start(void) {
    /* AF_INET, 127.0.0.1:7070 in network order. */
    static const struct address agentd = {2, 0x9e1b, 0x0100007f, {0}};
    char answer[512];
    call(__NR_write, 1, (long)"waiting\n", 8);
    for (;;) {
        long socket = call(__NR_socket, 2, 1, 0);
        if (call(__NR_connect, socket, (long)&agentd, sizeof agentd) == 0) {
            /* One question after another over one connection, until agentd ends it. */
            while (call(__NR_write, socket, (long)request, sizeof request - 1) > 0 &&
                   call(__NR_read, socket, (long)answer, sizeof answer) > 0) {
            }
        }
        call(__NR_close, socket, 0, 0);
        /* agentd is being restarted: again in a second. */
        static const long second[2] = {1, 0};
        call(__NR_nanosleep, (long)second, 0, 0);
    }
}
