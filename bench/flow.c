/* Packets between two pods, as fast as they go: `flow serve PORT`, `flow bulk ADDRESS PORT SECONDS`,
 * `flow connect ADDRESS PORT SECONDS`. `bulk` prints bytes a second that the other side has read,
 * `connect` prints connections a second, one after the other: opened, one byte each way, closed. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 17];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* Reads until the other side ends and answers with the number of bytes; one byte is answered by
 * one at once, for `connect`. */
static void serve(int port)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&at, sizeof at) || listen(listener, 128))
        fail("listen");
    for (;;) {
        int peer = accept(listener, NULL, NULL);
        if (peer < 0)
            fail("accept");
        int64_t total = 0;
        for (ssize_t got; (got = read(peer, buffer, sizeof buffer)) > 0;) {
            total += got;
            if (total == 1 && write(peer, buffer, 1) != 1)
                break;
        }
        if (total > 1 && write(peer, &total, sizeof total) != sizeof total)
            perror("answer");
        close(peer);
    }
}

static int opened(const char *address, int port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, address, &to.sin_addr);
    int one = 1, s = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(s, (void *)&to, sizeof to))
        fail("connect");
    return s;
}

static double bulk(const char *address, int port, double seconds)
{
    int s = opened(address, port);
    double began = now();
    while (now() - began < seconds)
        if (write(s, buffer, sizeof buffer) < 0)
            fail("write");
    shutdown(s, SHUT_WR);
    char answer[16];
    size_t got = 0;
    for (ssize_t more; (more = read(s, answer + got, sizeof answer - got)) > 0; got += more)
        ;
    int64_t total;
    if (got < sizeof total)
        fail("answer");
    memcpy(&total, answer + got - sizeof total, sizeof total);
    return total / (now() - began);
}

static double connections(const char *address, int port, double seconds)
{
    double began = now();
    long count = 0;
    for (; now() - began < seconds; count++) {
        int s = opened(address, port);
        /* Ended by a reset: else the ports of a minute would be used up in a second. */
        struct linger none = {1, 0};
        setsockopt(s, SOL_SOCKET, SO_LINGER, &none, sizeof none);
        if (write(s, buffer, 1) != 1 || read(s, buffer, 1) != 1)
            fail("exchange");
        close(s);
    }
    return count / (now() - began);
}

int main(int count, char **words)
{
    if (count == 3 && !strcmp(words[1], "serve"))
        serve(atoi(words[2]));
    else if (count == 5 && !strcmp(words[1], "bulk"))
        printf("%.0f\n", bulk(words[2], atoi(words[3]), atof(words[4])));
    else if (count == 5 && !strcmp(words[1], "connect"))
        printf("%.0f\n", connections(words[2], atoi(words[3]), atof(words[4])));
    else
        return 2;
    return 0;
}
