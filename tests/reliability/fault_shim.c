/* LD_PRELOAD: counts the calls that touch files below a folder, and lets the k-th of them fail once
   or kill the process. Armed from Python by fault_arm(folder, k, action) after a fork. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { LIST, FAIL, KILL };

static char root[PATH_MAX];
static long wanted;
static int action;
static atomic_long seen;

void fault_arm(const char *folder, long k, int what) {
    snprintf(root, sizeof root, "%s/", folder);
    wanted = k, action = what, atomic_store(&seen, 0);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void of_handle(int handle, char *place) {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(name, place, PATH_MAX - 1);
    place[length < 0 ? 0 : length] = 0;
}

static void of_path(int folder, const char *path, char *place) {
    char start[PATH_MAX] = "";
    if (path[0] == '/') {
        snprintf(place, PATH_MAX, "%s", path);
        return;
    }
    if (folder != AT_FDCWD) of_handle(folder, start);
    else if (!getcwd(start, sizeof start)) start[0] = 0;
    snprintf(place, PATH_MAX, "%.2000s/%.2000s", start, path);
}

/* Whether this call is the one. A killed write has written half of its bytes by then. */
static int hit(const char *kind, const char *place, int code) {
    if (!root[0] || strncmp(place, root, strlen(root))) return 0;
    long now = atomic_fetch_add(&seen, 1) + 1;
    if (action == LIST) dprintf(2, "touch %ld %s %s\n", now, kind, place + strlen(root));
    if (action == LIST || now != wanted) return 0;
    if (action == KILL && strcmp(kind, "write")) kill(getpid(), SIGKILL);
    errno = code;
    return 1;
}

static int hit_handle(const char *kind, int handle, int code) {
    if (!root[0]) return 0;
    char place[PATH_MAX];
    of_handle(handle, place);
    return hit(kind, place, code);
}

static int hit_path(const char *kind, int folder, const char *path, int code) {
    if (!root[0]) return 0;
    char place[PATH_MAX];
    of_path(folder, path, place);
    return hit(kind, place, code);
}

ssize_t write(int handle, const void *data, size_t size) {
    if (handle > 2 && hit_handle("write", handle, ENOSPC)) {
        if (action == KILL) {
            REAL(write)(handle, data, size / 2);
            kill(getpid(), SIGKILL);
        }
        return -1;
    }
    return REAL(write)(handle, data, size);
}

ssize_t pwrite64(int handle, const void *data, size_t size, off64_t at) {
    if (hit_handle("write", handle, ENOSPC)) {
        if (action == KILL) kill(getpid(), SIGKILL);
        return -1;
    }
    return REAL(pwrite64)(handle, data, size, at);
}

ssize_t writev(int handle, const struct iovec *parts, int count) {
    if (handle > 2 && hit_handle("write", handle, ENOSPC)) {
        if (action == KILL) kill(getpid(), SIGKILL);
        return -1;
    }
    return REAL(writev)(handle, parts, count);
}

int ftruncate64(int handle, off64_t size) {
    return hit_handle("truncate", handle, EIO) ? -1 : REAL(ftruncate64)(handle, size);
}

int fsync(int handle) { return hit_handle("fsync", handle, EIO) ? -1 : REAL(fsync)(handle); }

int rename(const char *one, const char *other) {
    return hit_path("rename", AT_FDCWD, other, EIO) ? -1 : REAL(rename)(one, other);
}

int renameat2(int a, const char *one, int b, const char *other, unsigned flags) {
    return hit_path("rename", b, other, EIO) ? -1 : REAL(renameat2)(a, one, b, other, flags);
}

int unlink(const char *path) {
    return hit_path("unlink", AT_FDCWD, path, EACCES) ? -1 : REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags) {
    return hit_path("unlink", folder, path, EACCES) ? -1 : REAL(unlinkat)(folder, path, flags);
}

int rmdir(const char *path) {
    return hit_path("unlink", AT_FDCWD, path, EACCES) ? -1 : REAL(rmdir)(path);
}

int mkdir(const char *path, mode_t mode) {
    return hit_path("mkdir", AT_FDCWD, path, ENOSPC) ? -1 : REAL(mkdir)(path, mode);
}

#define OPEN(name)                                                         \
    int name(const char *path, int flags, ...) {                           \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        mode_t mode = va_arg(rest, mode_t);                                \
        va_end(rest);                                                      \
        if (hit_path("open", AT_FDCWD, path, EACCES)) return -1;           \
        return REAL(name)(path, flags, mode);                              \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                       \
    int name(int folder, const char *path, int flags, ...) {               \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        mode_t mode = va_arg(rest, mode_t);                                \
        va_end(rest);                                                      \
        if (hit_path("open", folder, path, EACCES)) return -1;             \
        return REAL(name)(folder, path, flags, mode);                      \
    }
OPENAT(openat)
OPENAT(openat64)

FILE *fopen64(const char *path, const char *mode) {
    return hit_path("open", AT_FDCWD, path, EACCES) ? NULL : REAL(fopen64)(path, mode);
}
