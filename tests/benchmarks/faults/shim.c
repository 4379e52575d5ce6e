/* Makes the file system or the clock of a process misbehave: LD_PRELOAD. What it does stands in the file that SHIM_CONTROL names, one
 * order a line, which shim.py changes while the process runs:
 *
 *   hang PREFIX          whatever writes below PREFIX hangs for as long as this stands there
 *   fail PREFIX ERRNO    it fails
 *   spoil PREFIX ERRNO   it fails in files that are open, not when they are opened
 *   clock SECONDS        the wall clock is so far ahead
 *   flock ERRNO          every flock fails, but of files in memory (memfd), which no file system has
 *   log FILE             calls that make files durable are written to FILE: `fsync PATH`, `rename OLD NEW`
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static const char *control;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("SHIM_CONTROL");
    int fd = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDONLY) : -1;
    if (fd < 0) return;
    void *map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    if (map != MAP_FAILED) control = map;
    syscall(SYS_close, fd);
}

/* The rest of the first line that begins with `order`, into `rest`; 0 where there is none. */
static int find(const char *order, char *rest, size_t size, int nth) {
    const char *line = control;
    size_t length = strlen(order);
    while (line && *line) {
        if (!strncmp(line, order, length) && line[length] == ' ' && nth-- == 0) {
            size_t count = strcspn(line + length + 1, "\n");
            if (count >= size) count = size - 1;
            memcpy(rest, line + length + 1, count);
            rest[count] = 0;
            return 1;
        }
        line = strchr(line, '\n');
        if (line) line++;
    }
    return 0;
}

static void absolute(const char *path, char *into, size_t size) {
    if (path[0] == '/') { snprintf(into, size, "%s", path); return; }
    char here[2048];
    snprintf(into, size, "%s/%s", getcwd(here, sizeof here) ? here : "", path);
}

static int below(const char *path, const char *prefix) {
    size_t length = strlen(prefix);
    return !strncmp(path, prefix, length) && (path[length] == '/' || path[length] == 0);
}

static int failure(const char *order, const char *path) {
    char rest[2048], prefix[2048];
    int number;
    for (int nth = 0; find(order, rest, sizeof rest, nth); nth++)
        if (sscanf(rest, "%2047s %d", prefix, &number) == 2 && below(path, prefix)) return number;
    return 0;
}

/* Hang, or an errno to fail with, or 0. */
static int judge(const char *path) {
    char rest[2048];
    if (!control || !*control) return 0;
    for (int hangs = 1; hangs;) {
        hangs = 0;
        for (int nth = 0; find("hang", rest, sizeof rest, nth); nth++) hangs |= below(path, rest);
        if (hangs) syscall(SYS_nanosleep, &(struct timespec){0, 20000000}, NULL);
    }
    return failure("fail", path);
}

static int judge_path(const char *path) {
    char whole[4096];
    if (!control || !*control) return 0;
    absolute(path, whole, sizeof whole);
    return judge(whole);
}

static int name_of(int fd, char *into, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t count = syscall(SYS_readlinkat, AT_FDCWD, link, into, size - 1);
    if (count < 0) return 0;
    into[count] = 0;
    return into[0] == '/';
}

static int judge_fd(int fd) {
    char path[4096];
    if (!control || !*control) return 0;
    if (!name_of(fd, path, sizeof path)) return 0;
    int number = judge(path);
    return number ? number : failure("spoil", path);
}

static void note(const char *call, const char *first, const char *second) {
    char file[2048], line[8400];
    if (!control || !find("log", file, sizeof file, 0)) return;
    int fd = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_APPEND | O_CREAT, 0600);
    int count = snprintf(line, sizeof line, "%s %s%s%s\n", call, first, second ? " " : "", second ? second : "");
    if (fd >= 0) { syscall(SYS_write, fd, line, count); syscall(SYS_close, fd); }
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define JUDGED(verdict) do { int number = (verdict); if (number) { errno = number; return -1; } } while (0)

ssize_t write(int fd, const void *data, size_t size) { REAL(write); JUDGED(judge_fd(fd)); return real(fd, data, size); }
ssize_t writev(int fd, const struct iovec *data, int count) { REAL(writev); JUDGED(judge_fd(fd)); return real(fd, data, count); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); JUDGED(judge_fd(fd)); return real(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); JUDGED(judge_fd(fd)); return real(fd, data, size, at); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); JUDGED(judge_fd(fd)); return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); JUDGED(judge_fd(fd)); return real(fd, size); }

static int sync_one(const char *call, int fd, int (*real)(int)) {
    char path[4096];
    JUDGED(judge_fd(fd));
    int result = real(fd);
    if (result == 0 && control && *control && name_of(fd, path, sizeof path)) note(call, path, NULL);
    return result;
}
int fsync(int fd) { REAL(fsync); return sync_one("fsync", fd, real); }
int fdatasync(int fd) { REAL(fdatasync); return sync_one("fsync", fd, real); }

static int makes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }
#define MODE(mode, flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }

int open(const char *path, int flags, ...) { REAL(open); MODE(mode, flags); if (makes(flags)) JUDGED(judge_path(path)); return real(path, flags, mode); }
int open64(const char *path, int flags, ...) { REAL(open64); MODE(mode, flags); if (makes(flags)) JUDGED(judge_path(path)); return real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { REAL(openat); MODE(mode, flags); if (makes(flags) && at == AT_FDCWD) JUDGED(judge_path(path)); return real(at, path, flags, mode); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); JUDGED(judge_path(path)); return real(path, mode); }
int unlink(const char *path) { REAL(unlink); JUDGED(judge_path(path)); return real(path); }
int rename(const char *old, const char *new) {
    REAL(rename);
    char first[4096], second[4096];
    JUDGED(judge_path(new));
    int result = real(old, new);
    if (result == 0 && control && *control) {
        absolute(old, first, sizeof first);
        absolute(new, second, sizeof second);
        note("rename", first, second);
    }
    return result;
}

int flock(int fd, int operation) {
    REAL(flock);
    char rest[64], link[64], target[16] = "";
    if (control && *control && find("flock", rest, sizeof rest, 0)) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        if (readlink(link, target, sizeof target - 1) < 0 || strncmp(target, "/memfd:", 7)) { errno = atoi(rest); return -1; }
    }
    return real(fd, operation);
}

static long ahead(void) {
    char rest[64];
    return control && *control && find("clock", rest, sizeof rest, 0) ? atol(rest) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME) now->tv_sec += ahead();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday);
    int result = real(now, zone);
    if (result == 0) now->tv_sec += ahead();
    return result;
}
time_t time(time_t *into) {
    REAL(time);
    time_t now = real(NULL) + ahead();
    if (into) *into = now;
    return now;
}

/* Deadlines are times of the clock that a process sees, and the kernel waits by its own. Those of the monotonic clock are small. */
static struct timespec of_the_kernel(const struct timespec *deadline) {
    struct timespec kept = *deadline;
    if (kept.tv_sec > 1000000000) kept.tv_sec -= ahead();
    return kept;
}
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *deadline) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    /* The older one, which dlsym may give, is of other conditions. */
    if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec kept = of_the_kernel(deadline);
    return real(condition, mutex, &kept);
}
int sem_timedwait(sem_t *semaphore, const struct timespec *deadline) {
    REAL(sem_timedwait);
    struct timespec kept = of_the_kernel(deadline);
    return real(semaphore, &kept);
}
