package relay

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v7"
	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"
)

// A View is a directory with the images of a snapshot, for CRIU and others that know only directories. The images are links
// to what this process holds open in the memory of the cache: nothing is copied, and nothing changes when the cache drops
// the snapshot.
type View struct {
	dir    *os.File
	images []*os.File
}

// OpenView makes a view of a whole snapshot. Only root may open what the cache has open.
func (d Daemon) OpenView(ctx context.Context, id string) (*View, error) {
	files, err := d.Files(ctx, id)
	if err != nil {
		return nil, err
	}
	path, err := os.MkdirTemp("", "criu-images-")
	if err != nil {
		return nil, err
	}
	view := &View{}
	if view.dir, err = os.Open(path); err != nil {
		os.Remove(path)
		return nil, err
	}
	for _, file := range files {
		if err := view.add(file); err != nil {
			view.Close()
			return nil, fmt.Errorf("image %s of snapshot %s: %w", file.Name, id, err)
		}
	}
	return view, nil
}

func (v *View) add(file ImageFile) error {
	if file.Name != filepath.Base(file.Name) || file.Name == ".." || file.Name == "." {
		return fmt.Errorf("%q is no name of a file", file.Name)
	}
	image, err := os.Open(file.Path)
	if err != nil {
		return err
	}
	v.images = append(v.images, image)
	info, err := image.Stat()
	if err != nil {
		return err
	}
	// A snapshot that is dropped meanwhile leaves its numbers to others.
	if info.Size() != file.Bytes {
		return fmt.Errorf("it has %d bytes, %d were announced", info.Size(), file.Bytes)
	}
	link := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), image.Fd())
	return os.Symlink(link, filepath.Join(v.dir.Name(), file.Name))
}

// Dir is the directory, until the view is closed.
func (v *View) Dir() *os.File { return v.dir }

// Close removes the directory.
func (v *View) Close() error {
	err := os.RemoveAll(v.dir.Name())
	v.dir.Close()
	for _, image := range v.images {
		image.Close()
	}
	return err
}

// Restore waits until the cache holds the whole snapshot, and has CRIU restore it on this host. options, which may be nil,
// say how; where the images are is set here. The log and CRIU's statistics go to options.WorkDirFd, if that is set, and are
// lost otherwise.
//
// A process is restored as a child of this one. The cache holds the snapshot until it is dropped. It must not be restored
// before [Source.Migrate] has returned without an error, or from within [Options.HandOver].
func Restore(ctx context.Context, cache Daemon, id string, options *rpc.CriuOpts, notify criu.Notify) error {
	if _, err := cache.WaitWhole(ctx, id); err != nil {
		return err
	}
	view, err := cache.OpenView(ctx, id)
	if err != nil {
		return err
	}
	defer view.Close()
	if options == nil {
		options = &rpc.CriuOpts{}
	} else {
		options = proto.Clone(options).(*rpc.CriuOpts)
	}
	options.ImagesDirFd = proto.Int32(int32(view.Dir().Fd()))
	if options.LogFile == nil {
		options.LogFile = proto.String("restore.log")
	}
	if options.LogLevel == nil {
		options.LogLevel = proto.Int32(logLevel)
	}
	return criu.MakeCriu().Restore(options, notify)
}
