/* Records what a process does to the files below one folder, in order, and can kill it at the
   n-th such operation. Loaded with LD_PRELOAD; begins when `torture_begin` is called.

   A record: op (1 byte), lengths of the path, of the second path and of the data, an offset (four
   64-bit integers, little-endian), then path, second path, data. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 'C', WRITE = 'W', TRUNCATE = 'T', SYNC = 'S', RENAME = 'R', UNLINK = 'U', MAKE = 'D',
       REMOVE = 'X', MARK = 'M' };
#define FDS 4096

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int out = -1;
static long seen, kill_at;
static char *paths[FDS];

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static void all(const void *data, size_t n) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
  const char *p = data;
  while (n) {
    ssize_t done = real(out, p, n);
    if (done <= 0) abort();
    p += done, n -= done;
  }
}

/* The operation is about to happen (or, for a create, has happened): write it down, or die. */
static void note(char op, const char *path, const char *path2, const void *data, size_t n, int64_t offset) {
  seen++;
  if (kill_at && seen >= kill_at) kill(getpid(), SIGKILL);
  if (out < 0) return;
  int64_t head[4] = {strlen(path), path2 ? strlen(path2) : 0, n, offset};
  all(&op, 1), all(head, sizeof head), all(path, head[0]);
  if (path2) all(path2, head[1]);
  if (n) all(data, n);
}

static int inside(int dir, const char *path, char *full) {
  if (!root_length || !path) return 0;
  char base[PATH_MAX];
  if (path[0] == '/') snprintf(full, PATH_MAX, "%s", path);
  else {
    if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
    else {
      char link[64];
      snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
      ssize_t n = readlink(link, base, sizeof base - 1);
      if (n < 0) return 0;
      base[n] = 0;
    }
    if (snprintf(full, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
  }
  return !strncmp(full, root, root_length) && (full[root_length] == '/' || !full[root_length]);
}

static const char *path_of(int fd) { return fd >= 0 && fd < FDS && root_length ? paths[fd] : NULL; }

void torture_begin(const char *folder, const char *record, long at) {
  pthread_mutex_lock(&lock);
  static int (*real)(const char *, int, ...);
  if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
  if (record && *record) {
    int fd = real(record, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0644);
    out = fcntl(fd, F_DUPFD, 3000);
    close(fd);
  }
  kill_at = at, seen = 0;
  snprintf(root, sizeof root, "%s", folder);
  root_length = strlen(root);
  pthread_mutex_unlock(&lock);
}

void torture_mark(const char *name) {
  pthread_mutex_lock(&lock);
  if (out >= 0) { seen--; note(MARK, name, NULL, NULL, 0, 0); }
  pthread_mutex_unlock(&lock);
}

long torture_seen(void) { return seen; }

static int opened(int (*real)(int, const char *, int, ...), int dir, const char *path, int flags, mode_t mode) {
  char full[PATH_MAX];
  struct stat before;
  if (!inside(dir, path, full)) return real(dir, path, flags, mode);
  pthread_mutex_lock(&lock);
  int was = !fstatat(dir, path, &before, 0);
  if (!was && (flags & O_CREAT)) note(CREATE, full, NULL, NULL, 0, 0);
  else if (was && (flags & O_TRUNC) && before.st_size) note(TRUNCATE, full, NULL, NULL, 0, 0);
  int fd = real(dir, path, flags, mode);
  if (fd >= 0 && fd < FDS) { free(paths[fd]); paths[fd] = strdup(full); }
  pthread_mutex_unlock(&lock);
  return fd;
}

static int real_openat(int dir, const char *path, int flags, ...) {
  static int (*real)(int, const char *, int, ...);
  if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64");
  va_list more;
  va_start(more, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
  va_end(more);
  return real(dir, path, flags, mode);
}

#define MODE \
  mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { va_list m; va_start(m, flags); mode = va_arg(m, mode_t); va_end(m); }
int open(const char *path, int flags, ...) { MODE return opened(real_openat, AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(real_openat, AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE return opened(real_openat, dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE return opened(real_openat, dir, path, flags, mode); }

static FILE *stream(FILE *(*real)(const char *, const char *), const char *path, const char *mode) {
  char full[PATH_MAX];
  struct stat before;
  if (!inside(AT_FDCWD, path, full)) return real(path, mode);
  pthread_mutex_lock(&lock);
  int was = !stat(path, &before);
  if (!was && mode[0] != 'r') note(CREATE, full, NULL, NULL, 0, 0);
  else if (was && mode[0] == 'w' && before.st_size) note(TRUNCATE, full, NULL, NULL, 0, 0);
  FILE *file = real(path, mode);
  if (file && fileno(file) < FDS) { free(paths[fileno(file)]); paths[fileno(file)] = strdup(full); }
  pthread_mutex_unlock(&lock);
  return file;
}
FILE *fopen(const char *path, const char *mode) { REAL(fopen); return stream(real, path, mode); }
FILE *fopen64(const char *path, const char *mode) { REAL(fopen64); return stream(real, path, mode); }

int close(int fd) {
  REAL(close);
  if (path_of(fd)) {
    pthread_mutex_lock(&lock);
    free(paths[fd]), paths[fd] = NULL;
    pthread_mutex_unlock(&lock);
  }
  return real(fd);
}

static int duplicated(int from, int to) {
  if (to >= 0 && to < FDS && path_of(from)) { free(paths[to]); paths[to] = strdup(paths[from]); }
  return to;
}
int dup(int fd) { REAL(dup); return duplicated(fd, real(fd)); }

#define GUARDED(fd, before, call) \
  const char *path = path_of(fd); \
  if (!path) return call; \
  pthread_mutex_lock(&lock); \
  before; \
  __typeof__(call) result = call; \
  pthread_mutex_unlock(&lock); \
  return result

static int64_t place(int fd) {
  int flags = fcntl(fd, F_GETFL);
  struct stat now;
  if (flags >= 0 && (flags & O_APPEND) && !fstat(fd, &now)) return now.st_size;
  return lseek(fd, 0, SEEK_CUR);
}

ssize_t write(int fd, const void *data, size_t n) {
  REAL(write);
  GUARDED(fd, note(WRITE, path, NULL, data, n, place(fd)), real(fd, data, n));
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
  REAL(pwrite);
  GUARDED(fd, note(WRITE, path, NULL, data, n, at), real(fd, data, n, at));
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
  REAL(pwrite64);
  GUARDED(fd, note(WRITE, path, NULL, data, n, at), real(fd, data, n, at));
}
static void vector(const char *path, const struct iovec *parts, int n, int64_t at) {
  size_t total = 0;
  for (int i = 0; i < n; i++) total += parts[i].iov_len;
  char *data = malloc(total + 1), *p = data;
  for (int i = 0; i < n; i++) memcpy(p, parts[i].iov_base, parts[i].iov_len), p += parts[i].iov_len;
  note(WRITE, path, NULL, data, total, at);
  free(data);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  REAL(writev);
  GUARDED(fd, vector(path, parts, n, place(fd)), real(fd, parts, n));
}
ssize_t sendfile(int to, int from, off_t *at, size_t n) {
  static ssize_t (*real)(int, int, off_t *, size_t);
  if (!real) real = (ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile");
  if (!path_of(to)) return real(to, from, at, n);
  char data[65536];  /* as reads and writes, so that it is recorded */
  ssize_t got = at ? pread(from, data, n < sizeof data ? n : sizeof data, *at) : read(from, data, n < sizeof data ? n : sizeof data);
  if (got <= 0) return got;
  if (at) *at += got;
  return write(to, data, got);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) { return sendfile(to, from, (off_t *)at, n); }
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t n, unsigned flags) {
  REAL(copy_file_range);
  if (!path_of(to)) return real(from, at, to, to_at, n, flags);
  if (to_at) abort();
  return sendfile(to, from, (off_t *)at, n);
}
int fsync(int fd) { REAL(fsync); GUARDED(fd, note(SYNC, path, NULL, NULL, 0, 0), real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); GUARDED(fd, note(SYNC, path, NULL, NULL, 0, 0), real(fd)); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); GUARDED(fd, note(TRUNCATE, path, NULL, NULL, 0, size), real(fd, size)); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); GUARDED(fd, note(TRUNCATE, path, NULL, NULL, 0, size), real(fd, size)); }
int fallocate(int fd, int mode, off_t at, off_t n) {
  REAL(fallocate);
  GUARDED(fd, note(TRUNCATE, path, NULL, NULL, 0, at + n), real(fd, mode, at, n));
}
int posix_fallocate(int fd, off_t at, off_t n) {
  REAL(posix_fallocate);
  GUARDED(fd, note(TRUNCATE, path, NULL, NULL, 0, at + n), real(fd, at, n));
}

static void moved(const char *from, const char *to) {
  size_t n = strlen(from);
  for (int i = 0; i < FDS; i++)
    if (paths[i] && !strncmp(paths[i], from, n) && (!paths[i][n] || paths[i][n] == '/')) {
      char now[2 * PATH_MAX];
      snprintf(now, sizeof now, "%s%s", to, paths[i] + n);
      free(paths[i]), paths[i] = strdup(now);
    }
}
#define NAMED(op, dir, name, call) \
  char full[PATH_MAX]; \
  if (!inside(dir, name, full)) return call; \
  pthread_mutex_lock(&lock); \
  struct stat there; \
  if (fstatat(dir, name, &there, AT_SYMLINK_NOFOLLOW) == (op == MAKE ? -1 : 0)) note(op, full, NULL, NULL, 0, 0); \
  __typeof__(call) result = call; \
  pthread_mutex_unlock(&lock); \
  return result
#define RENAMED(dir, from, dir2, to, call) \
  char full[PATH_MAX], full2[PATH_MAX]; \
  int a = inside(dir, from, full), b = inside(dir2, to, full2); \
  if (!a && !b) return call; \
  pthread_mutex_lock(&lock); \
  note(RENAME, full, full2, NULL, 0, 0); \
  __typeof__(call) result = call; \
  if (!result) moved(full, full2); \
  pthread_mutex_unlock(&lock); \
  return result
int rename(const char *from, const char *to) { REAL(rename); RENAMED(AT_FDCWD, from, AT_FDCWD, to, real(from, to)); }
int renameat(int dir, const char *from, int dir2, const char *to) { REAL(renameat); RENAMED(dir, from, dir2, to, real(dir, from, dir2, to)); }
int renameat2(int dir, const char *from, int dir2, const char *to, unsigned f) { REAL(renameat2); RENAMED(dir, from, dir2, to, real(dir, from, dir2, to, f)); }
int unlink(const char *name) { REAL(unlink); NAMED(UNLINK, AT_FDCWD, name, real(name)); }
int remove(const char *name) { REAL(remove); NAMED(UNLINK, AT_FDCWD, name, real(name)); }
int rmdir(const char *name) { REAL(rmdir); NAMED(REMOVE, AT_FDCWD, name, real(name)); }
int unlinkat(int dir, const char *name, int flags) { REAL(unlinkat); NAMED((flags & AT_REMOVEDIR ? REMOVE : UNLINK), dir, name, real(dir, name, flags)); }
int mkdir(const char *name, mode_t mode) { REAL(mkdir); NAMED(MAKE, AT_FDCWD, name, real(name, mode)); }
int mkdirat(int dir, const char *name, mode_t mode) { REAL(mkdirat); NAMED(MAKE, dir, name, real(dir, name, mode)); }
