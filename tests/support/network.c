/* Preloaded into a process: every address outside this machine that it looks up or connects to goes to $WATCH_LOG. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *where) {
    const char *path = getenv("WATCH_LOG");
    char line[512];
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
    if (file < 0)
        return;
    int length = snprintf(line, sizeof line, "%s %s\n", what, where);
    if (write(file, line, length) < 0)
        abort();
    close(file);
}

static void note_address(const char *what, const struct sockaddr *address) {
    char text[INET6_ADDRSTRLEN] = "";
    if (!address)
        return;
    if (address->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)address)->sin_addr, text, sizeof text);
    else if (address->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)address)->sin6_addr, text, sizeof text);
    if (*text && strncmp(text, "127.", 4) && strcmp(text, "::1"))
        note(what, text);
}

static void note_name(const char *what, const char *name) {
    if (name && strncmp(name, "127.", 4) && strcmp(name, "::1") && strcmp(name, "localhost") && strcmp(name, "0.0.0.0"))
        note(what, name);
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    note_address("connect", address);
    return ((int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "connect"))(fd, address, length);
}

ssize_t sendto(int fd, const void *data, size_t n, int flags, const struct sockaddr *address, socklen_t length) {
    note_address("sendto", address);
    return ((ssize_t(*)(int, const void *, size_t, int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "sendto"))(
        fd, data, n, flags, address, length);
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **result) {
    note_name("getaddrinfo", name);
    return ((int (*)(const char *, const char *, const struct addrinfo *, struct addrinfo **))dlsym(
        RTLD_NEXT, "getaddrinfo"))(name, service, hints, result);
}

struct hostent *gethostbyname(const char *name) {
    note_name("gethostbyname", name);
    return ((struct hostent * (*)(const char *)) dlsym(RTLD_NEXT, "gethostbyname"))(name);
}
