/* Writes below the directory STALL_BELOW hang for as long as the file STALL_NOW is there: LD_PRELOAD. As a server that does not answer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static void wait_below(const char *path) {
    const char *below = getenv("STALL_BELOW"), *now = getenv("STALL_NOW");
    while (below && now && !strncmp(path, below, strlen(below)) && access(now, F_OK) == 0) usleep(20000);
}

static void wait_of(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t count = readlink(link, path, sizeof path - 1);
    if (count > 0) { path[count] = 0; wait_below(path); }
}

#define REAL(name) __typeof__(name) *real = dlsym(RTLD_NEXT, #name)
ssize_t write(int fd, const void *data, size_t size) { REAL(write); wait_of(fd); return real(fd, data, size); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); wait_of(fd); return real(fd, data, size, at); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); wait_of(fd); return real(fd, size); }
int fsync(int fd) { REAL(fsync); wait_of(fd); return real(fd); }
int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list list;
    va_start(list, flags);
    mode_t mode = va_arg(list, mode_t);
    va_end(list);
    if (flags & O_CREAT) wait_below(path);
    return real(path, flags, mode);
}
