/*
 * The CNI executable, compiled: what cni/plugin.py does, for the ordinary call, without the ten
 * milliseconds that an interpreter needs to begin.
 *
 * It passes the CNI_... variables and standard input to cnid and prints what cnid answers, both
 * unread. It knows nothing, allocates nothing and decides nothing: whatever is not ordinary (VERSION,
 * a command or a configuration that it does not understand at a glance, no cnid, an answer that
 * breaks off) is left to plugin.py, which stands beside it as <name>.py. That one gets standard
 * input anew, and as its argument what went wrong when cnid was asked already.
 *
 * The protocol is described in plugin.py. Built by cni/build.py: cc -O2 -static.
 */

#define _GNU_SOURCE

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define PROTOCOL "2"
#define TIMEOUT_S 60
#define MAX_CONFIG (1 << 20)
#define MAX_ENVIRONMENT (1 << 17)
#define MAX_ANSWER (1 << 20)
#define SOCKET_MARK "cymric-cni socket="

extern char **environ;

/* Whoever installs this file may write another path over this one; it ends with a zero byte. */
static volatile const char default_socket[sizeof SOCKET_MARK + 107] =
    SOCKET_MARK "/run/cymric/cni.sock";

static char config[MAX_CONFIG + 1];
static size_t config_size;
static char variables[MAX_ENVIRONMENT];
static size_t variables_size;
static char answer[MAX_ANSWER + 1];

/* plugin.py takes over; `trouble` is what went wrong, or NULL if nothing was asked yet. */
static void hand_over(const char *trouble)
{
    char script[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", script, sizeof script - sizeof ".py");
    char *const arguments[] = {script, (char *)trouble, NULL};
    int file;

    if (length < 0 || (size_t)length >= sizeof script - sizeof ".py")
        _exit(1);
    memcpy(script + length, ".py", sizeof ".py");
    file = memfd_create("configuration", 0);
    if (file >= 0) {
        size_t done = 0;
        while (done < config_size) {
            ssize_t count = write(file, config + done, config_size - done);
            if (count <= 0)
                _exit(1);
            done += (size_t)count;
        }
        if (lseek(file, 0, SEEK_SET) < 0 || dup2(file, STDIN_FILENO) < 0)
            _exit(1);
        execve(script, arguments, environ);
    }
    /* Nobody is left to say it well. The version is one that every runtime knows. */
    printf("{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"cannot run the rest of the plugin\"}\n");
    fflush(stdout);
    _exit(1);
}

static void read_config(void)
{
    for (;;) {
        ssize_t count = read(STDIN_FILENO, config + config_size, sizeof config - config_size);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            hand_over(NULL);
        if (count == 0)
            return;
        config_size += (size_t)count;
        if (config_size == sizeof config)
            hand_over("the configuration is over 1 MiB");
    }
}

static void gather_variables(void)
{
    for (char **variable = environ; *variable != NULL; variable++) {
        size_t size = strlen(*variable) + 1;
        if (strncmp(*variable, "CNI_", 4) != 0)
            continue;
        if (size > sizeof variables - variables_size)
            hand_over(NULL);
        memcpy(variables + variables_size, *variable, size);
        variables_size += size;
    }
}

static int is_ordinary(const char *command)
{
    static const char *const known[] = {"ADD", "DEL", "CHECK", "GC", "STATUS"};

    for (size_t i = 0; command != NULL && i < sizeof known / sizeof *known; i++)
        if (strcmp(command, known[i]) == 0)
            return 1;
    return 0;
}

/* The path of cnid's socket. The configuration may name it, once and plainly. */
static void find_socket(struct sockaddr_un *address)
{
    static const char key[] = "\"socket\"";
    const char *end = config + config_size, *at, *start, *stop;
    size_t length;

    address->sun_family = AF_UNIX;
    at = memmem(config, config_size, key, sizeof key - 1);
    if (at == NULL) {
        length = sizeof SOCKET_MARK - 1;
        for (size_t i = 0; i < sizeof address->sun_path - 1; i++)
            if ((address->sun_path[i] = default_socket[length + i]) == '\0')
                return;
        hand_over(NULL);
    }
    at += sizeof key - 1;
    if (memmem(at, (size_t)(end - at), key, sizeof key - 1) != NULL)
        hand_over(NULL);
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
        at++;
    if (at == end || *at++ != ':')
        hand_over(NULL);
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
        at++;
    if (end - at < 2 || at[0] != '"' || at[1] != '/')
        hand_over(NULL);
    start = at + 1;
    stop = memchr(start, '"', (size_t)(end - start));
    if (stop == NULL || memchr(start, '\\', (size_t)(stop - start)) != NULL ||
        memchr(start, '\0', (size_t)(stop - start)) != NULL)
        hand_over(NULL);
    length = (size_t)(stop - start);
    if (length >= sizeof address->sun_path)
        hand_over(NULL);
    memcpy(address->sun_path, start, length);
}

static int connect_to_cnid(void)
{
    struct sockaddr_un address = {0};
    struct timeval limit = {.tv_sec = TIMEOUT_S};
    int connection;

    find_socket(&address);
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connection < 0 ||
        setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) < 0 ||
        setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) < 0 ||
        connect(connection, (struct sockaddr *)&address, sizeof address) < 0)
        hand_over(NULL);
    return connection;
}

static void send_all(int connection, const char *bytes, size_t size)
{
    while (size > 0) {
        ssize_t count = send(connection, bytes, size, MSG_NOSIGNAL);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && errno == EPIPE)
            return; /* refused before all of it was read: the answer says why */
        if (count < 0)
            hand_over(strerror(errno));
        bytes += count;
        size -= (size_t)count;
    }
}

static size_t receive_all(int connection)
{
    size_t size = 0;

    for (;;) {
        ssize_t count = recv(connection, answer + size, MAX_ANSWER - size, 0);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            hand_over(strerror(errno));
        if (count == 0)
            return size;
        size += (size_t)count;
        if (size == MAX_ANSWER)
            hand_over("the answer is over 1 MiB");
    }
}

int main(int argc, char **argv)
{
    const char *name = argc > 0 ? argv[0] : "", *slash = strrchr(name, '/');
    char head[128], *line_end;
    size_t size, is_ipam;
    long code;
    int connection, head_size;

    name = slash != NULL ? slash + 1 : name;
    is_ipam = strcmp(name, "cymric-cni-ipam") == 0 || strcmp(name, "calico-ipam") == 0;
    if (!is_ordinary(getenv("CNI_COMMAND"))) {
        read_config();
        hand_over(NULL);
    }
    read_config();
    gather_variables();
    connection = connect_to_cnid();
    head_size = snprintf(head, sizeof head, "cymric-cni " PROTOCOL " %s %zu %zu\n",
                         is_ipam ? "ipam" : "main", variables_size, config_size);
    send_all(connection, head, (size_t)head_size);
    send_all(connection, variables, variables_size);
    send_all(connection, config, config_size);
    size = receive_all(connection);
    answer[size] = '\0';
    line_end = memchr(answer, '\n', size);
    if (line_end == NULL || strncmp(answer, "cymric-cni " PROTOCOL " ", 13) != 0)
        hand_over("the answer breaks off, or is not of this protocol's version");
    code = strtol(answer + 13, &line_end, 10);
    if (*line_end != '\n' || line_end == answer + 13 || code < 0 || code > 255)
        hand_over("the answer is not of this protocol's version");
    for (const char *at = line_end + 1; at < answer + size;) {
        ssize_t count = write(STDOUT_FILENO, at, (size_t)(answer + size - at));
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            _exit(1);
        at += count;
    }
    _exit((int)code);
}
